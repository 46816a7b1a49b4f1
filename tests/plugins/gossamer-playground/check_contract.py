"""The contract that every workload keeps, checked for this one."""

from gossamer_playground.activity import Activity

from gossamer.testing import check_workload


def test_contract() -> None:
    check_workload(Activity({"modalities": {"acceleration+note": 0.5, "note": 0.5}}, num_clients=4))
