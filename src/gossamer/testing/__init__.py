"""Contract tests for workloads, algorithms and optimizers of your own, to be called from any test.

A check returns None, or raises a `gossamer.errors.ContractError`, which is an `AssertionError`, with one sentence that
says which part of the contract is broken, by which value, and what to do. Nothing here needs pytest.
"""

from __future__ import annotations

from gossamer.errors import ContractError
from gossamer.testing.algorithms import check_algorithm
from gossamer.testing.optimizers import check_optimizer
from gossamer.testing.workloads import check_workload

__all__ = ["ContractError", "check_algorithm", "check_optimizer", "check_workload"]
