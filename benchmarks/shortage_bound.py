"""How few steps 64 requests of 64 + 448 tokens can take in 512 blocks of 16, whoever schedules them.

    python benchmarks/shortage_bound.py        # needs scipy, in any environment

A linear program over time in units of one block (16 steps): sequences at each length run, pause with their blocks,
give all of them up, or take them again, which computes their tokens a second time. Sequences are a fluid and all
lengths are known, so the result is a bound: no real schedule finishes more requests in as many steps.
"""

from __future__ import annotations

from collections import defaultdict
import sys

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import csr_matrix

BLOCK = 16
REQUESTS = 64
PROMPT_BLOCKS = 4
FINAL_BLOCKS = 32
POOL_BLOCKS = 512.0
TOKENS = REQUESTS * FINAL_BLOCKS * BLOCK

Row = dict[int, float]


def finished(periods: int, twice: float) -> float:
    """Returns how many of the requests can be finished in `periods` blocks of time.

    Args:
        periods: time, in units of BLOCK steps.
        twice: tokens that may be computed a second time.
    """
    names: dict[tuple[object, ...], int] = {}

    def variable(*name: object) -> int:
        return names.setdefault(name, len(names))

    balance: dict[tuple[object, ...], Row] = defaultdict(lambda: defaultdict(float))
    memory: list[Row] = [defaultdict(float) for _ in range(periods)]
    recomputed: Row = defaultdict(float)
    for time in range(periods):
        for blocks in range(PROMPT_BLOCKS, FINAL_BLOCKS):
            for held, after in ((0, 0), (0, blocks), (blocks, 0), (blocks, blocks)):
                moved = variable("move", time, blocks, held, after)
                balance["before", time, blocks, held][moved] -= 1
                balance["after", time, blocks, after][moved] += 1
                if after > held and blocks > PROMPT_BLOCKS:
                    recomputed[moved] += BLOCK * blocks
            for held in (0, blocks):
                stays = variable("stay", time, blocks, held)
                balance["after", time, blocks, held][stays] -= 1
                balance["before", time + 1, blocks, held][stays] += 1
                memory[time][stays] += held
            runs = variable("run", time, blocks)
            balance["after", time, blocks, blocks][runs] -= 1
            memory[time][runs] += blocks + 1
            balance["before", time + 1, blocks + 1, blocks + 1][runs] += 1
    ends = balance_rows(balance, periods)
    equal = [row for name, row in balance.items() if name[1] != periods and name[2] != FINAL_BLOCKS]
    start = [
        -float(REQUESTS) if name == ("before", 0, PROMPT_BLOCKS, 0) else 0.0
        for name in balance
        if name[1] != periods and name[2] != FINAL_BLOCKS
    ]
    cost = np.zeros(len(names))
    cost[ends] = -1
    solved = linprog(
        cost,
        A_eq=matrix(equal, len(names)),
        b_eq=start,
        A_ub=matrix([*memory, recomputed], len(names)),
        b_ub=[*[POOL_BLOCKS] * periods, twice],
        method="highs",
    )
    return float(-solved.fun)


def balance_rows(balance: dict[tuple[object, ...], Row], periods: int) -> list[int]:
    """Returns the variables that finish a request in time."""
    return [
        column
        for name, row in balance.items()
        if name[0] == "before" and name[2] == FINAL_BLOCKS and int(str(name[1])) <= periods
        for column in row
    ]


def matrix(rows: list[Row], columns: int) -> csr_matrix:
    """Returns rows of coefficients as a sparse matrix."""
    places = [(row, column, value) for row, items in enumerate(rows) for column, value in items.items()]
    at, column, values = zip(*places, strict=True)
    return csr_matrix((values, (at, column)), shape=(len(rows), columns))


def main() -> int:
    """Prints what can be finished in so many steps, for some shares computed twice."""
    print("steps  computed twice  requests finished at most")
    for steps in (1200, 1248, 1280, 1312):
        for share in (0.0, 0.03, 0.105):
            done = finished(steps // BLOCK, TOKENS * share / (1 - share))
            print(f"{steps:5}  {share:14.1%}  {min(done, REQUESTS):25.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
