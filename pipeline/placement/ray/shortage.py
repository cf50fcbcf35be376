"""Why stages cannot be placed: what is lacking of which resource."""

from collections.abc import Mapping, Sequence

from pipeline.units import GIB

Resources = Mapping[str, float]


def shortage(
    needs: Resources,
    num_stages: int,
    strategy: str,
    nodes: Sequence[Resources],
    free: Resources,
    num_missing: int = 1,
) -> str | None:
    """One line for people; None where nothing is lacking.

    `needs`: of each stage. `nodes`: what each has in all. `free`: what is left of all of them, for
    the stages that have no place.
    """
    fitting = [node for node in nodes if all(node.get(k, 0) >= v for k, v in needs.items())]
    if not fitting:
        most = {name: max((node.get(name, 0) for node in nodes), default=0) for name in needs}
        lacking = [name for name, amount in needs.items() if most[name] < amount]
        if not lacking:
            return f"a stage takes {_all(needs)} of one node, and no node has all of that"
        found = ", ".join(f"{_told(name, most[name])} at most" for name in lacking)
        return f"a stage takes {_all(needs)} of one node, and the {len(nodes)} nodes have {found}"
    if strategy == "STRICT_SPREAD" and len(fitting) < num_stages:
        return (
            f"STRICT_SPREAD has {num_stages} stages on as many nodes, and {len(fitting)} of "
            f"{len(nodes)} nodes have {_all(needs)}"
        )
    wanted = {name: amount * num_stages for name, amount in needs.items()}
    if strategy == "STRICT_PACK" and not any(
        all(node.get(k, 0) >= v for k, v in wanted.items()) for node in nodes
    ):
        return f"STRICT_PACK has all stages on one node, and none has {_all(wanted)}"
    missing = {name: amount * num_missing for name, amount in needs.items()}
    lacking = [name for name, amount in missing.items() if free.get(name, 0) < amount]
    if lacking:
        left = ", ".join(_told(name, free.get(name, 0)) for name in lacking)
        who = "a stage takes" if num_missing == 1 else f"{num_missing} stages take"
        return f"{who} {_all(missing)}, and the nodes have {left} left"
    return None


def _all(needs: Resources) -> str:
    return ", ".join(_told(name, amount) for name, amount in needs.items())


def _told(name: str, amount: float) -> str:
    if name == "memory":
        return f"memory {amount / GIB:.3g} GiB"
    return f"{name} {amount:g}"
