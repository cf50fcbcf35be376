"""Draw each token's entropy and the bits it carried: plot_stego.py STATS.json PICTURE.png."""

import json
import sys
from itertools import accumulate
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt


def main(source, picture):
    statistics = json.loads(Path(source).read_text())
    steps = statistics["tokens"]
    entropies = [step["entropy"] for step in steps]
    carried = [step["carried"] for step in steps]
    figure, (each, all_) = plt.subplots(2, sharex=True, figsize=(9, 6), layout="constrained")
    each.bar(range(len(steps)), entropies, color="lightsteelblue", label="entropy")
    each.plot(carried, ".", color="firebrick", label="carried")
    each.set_ylabel("bits of a token")
    each.legend()
    all_.plot(list(accumulate(entropies)), color="steelblue", label="entropy")
    all_.plot(list(accumulate(carried)), color="firebrick", label="carried")
    all_.axhline(statistics["bits"], color="gray", linestyle=":", label="header and message")
    all_.set_ylabel("bits so far")
    all_.set_xlabel("token")
    all_.legend()
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(*sys.argv[1:])
