"""Attacks on the connection (tests/e2e/attacks.py), each with a bystander."""

from __future__ import annotations

import re

import uvloop

from tests.bench.sharing.bystander import load_command, with_bystander
from tests.bench.sharing.front import Figures, Front, Scenario
from tests.e2e.attacks import ATTACKS
from tests.etcd.server import EtcdServer


def attacked(name: str) -> Scenario:
    """Make the scenario of one attack."""

    def scenario(front: Front) -> Figures:
        with EtcdServer() as etcd, front.before(etcd.endpoint) as address:
            figures = uvloop.run(with_bystander(front, etcd, address, "tests.bench.sharing.attacks", name))
        wanted, outcome = ATTACKS[name].wants, str(figures.get("outcome", ""))
        assert front.root is None or re.fullmatch(wanted, outcome), f"{name}: {outcome!r}, not {wanted!r}"
        return figures

    return scenario


SCENARIOS: dict[str, Scenario] = {f"attack: {name}": attacked(name) for name in ATTACKS}

main = load_command({name: attack.run for name, attack in ATTACKS.items()})


if __name__ == "__main__":
    main()
