"""Draw the paper's Figure 1(b) again; writes docs/_static/parameter-scaling.svg.

Run: python docs/figures/parameter_scaling.py
"""

from pathlib import Path

import matplotlib

from tucka.plots import parameter_scaling

if __name__ == "__main__":
    matplotlib.rcParams["svg.hashsalt"] = "tucka"  # the same file from every run
    axes = parameter_scaling()
    axes.figure.savefig(Path(__file__).parent.parent / "_static" / "parameter-scaling.svg", metadata={"Date": None})
