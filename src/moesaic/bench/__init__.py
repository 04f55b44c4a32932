"""The benchmark behind `moesaic bench`: one layer of experts, ours beside what others run, in the same rounds.

`layer` holds what is timed, `peers` who is timed, `libraries` the adapters of GPU libraries, `limits` what a peer may
tune, `timing` how, `roofline` what the machine could do, `harness` the loop over it all, `report` what is left behind.
"""

from .harness import Plan, Result, Row, run
from .peers import PEERS, Peer

__all__ = ["PEERS", "Peer", "Plan", "Result", "Row", "run"]
