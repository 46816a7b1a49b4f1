"""The README of a start-up kit."""

from __future__ import annotations

from datetime import date

from gossamer.transport.authentication import KEY_FILE, MEMBERS_FILE, TOKEN_FILE, KitFacts

HEAD = """# {federation}: start-up kit of {kind} {node}

Copy this folder to the machine of {node}, and nowhere else. Install gossamer there, and {what}:

    {command}

- `{key}` and `{token}` are secret: whoever has them is {node}. Only your account may read them (`chmod 600`).
- The certificate holds until {expires}. Ask for a new kit before:
  `gossamer node provision FEDERATION.yaml -o DIR --renew {node}`
- If this folder was lost or stolen: `gossamer node provision FEDERATION.yaml -o DIR --revoke {node}`
"""
CLIENT = """- {node} is client {number} of a run.
- Nobody dials this machine: it dials {server}, and needs that port open outwards only.
- Your data stay here. What the server may ask of you is limited by a policy: add `--policy policy.yaml`, such as

      algorithms: [fedavg, fedrolex]
      models: [mlp, cnn]
      max_epochs: 5

  Without one, everything that gossamer includes is accepted, and neither code nor files that the server names.
"""
PEER = """- {node} is peer {number} of a run. EXPERIMENT.yaml is the same at all of them, and so is ADDRESSES.yaml:

      peers: [a.example.org:8443, b.example.org:8443]  # in the order of their numbers

- There is no server: this machine dials its neighbours, and they dial it.
- Its data are its part of those that EXPERIMENT.yaml names; with `--data DATA` they are your own, and stay here.
"""
LISTENING = """- Open port {port} to those who dial this machine, and no other one.
- `{members}` says who is let in. After nodes were added, renewed or revoked, copy it here again from where the
  federation was made; it is read anew while the node runs.
"""


def text(kit: KitFacts, expires: date, port: int) -> str:
    """Return the README of a kit.

    Args:
        expires: last day of its certificate.
        port: port on which the node listens, if it does.
    """
    run = "run, in this folder"
    what, command = {
        "server": (run, f"gossamer node server EXPERIMENT.yaml --kit . --listen 0.0.0.0:{port}"),
        "client": (run, "gossamer node client --kit . --data DATA"),
        "peer": (
            run,
            f"gossamer node peer EXPERIMENT.yaml --kit . --peers ADDRESSES.yaml --listen 0.0.0.0:{port}",
        ),
    }[kit.kind]
    facts = kit.model_dump() | {
        "what": what,
        "command": command,
        "expires": expires,
        "port": port,
        "members": MEMBERS_FILE,
    }
    rest = {"client": CLIENT, "peer": PEER + LISTENING, "server": LISTENING}[kit.kind]
    return (HEAD + rest).format(**facts, key=KEY_FILE, token=TOKEN_FILE)
