"""Published measurements of collectives as rows of one kind.

Traps (README of the measurements, 11 to 14): sizes are of the whole buffer; 8-bit integers are not added in the switch;
profilers' kernel times hold what one rank waits for another, and those that a blocking host waits for its own time, of
which rows of small all_reduces within a node say more than of the links: they are left out.
"""

from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd

from perfmodel.errors import UserError
from perfmodel.network import files
from perfmodel.network.files import NodeFile

# (system in the file) -> the node that it stands for. Others are GPUs without a profile, or unnamed.
WITHIN = {
    "h100_sxm": "dgx-h100", "h100_dgx": "dgx-h100", "a100_sxm": "dgx-a100", "a100_dgx": "dgx-a100",
    "8x A100 node": "dgx-a100", "b200_sxm": "dgx-b200", "p6-b200.48xlarge": "dgx-b200", "b300_sxm": "dgx-b300",
    "gb200": "gb200-tray", "l40s": "l40s-8", "a100_pairwise_nvlink": "a100-pcie-4", "a40_pairwise_nvlink": "a40-4",
}  # fmt: skip
ACROSS = {  # the same where a row is of several nodes
    "h100_dgx": "dgx-h100", "a100_dgx": "a100-8-ethernet", "a100_pairwise_nvlink": "a100-pcie-4",
    "a40_pairwise_nvlink": "a40-4", "p6-b200.48xlarge": "aws-p6-b200", "2x p4de.24xlarg": "aws-p4de",
    "2 DGX Spark, one QSFP cable": "dgx-spark",
}  # fmt: skip
BLACKWELL = ("dgx-b200", "dgx-b300", "gb200-tray")
SWITCHED = ("dgx-h100", "dgx-a100", *BLACKWELL)  # one class of links
ADDING = ("dgx-h100", "dgx-b200", "dgx-b300")  # whose switch adds, in groups large enough that it pays
ADDED = ("half", "bfloat16", "float32")  # what it adds
SKEW = {  # launch -> bytes below which its all_reduces say more about ranks that wait, or the host, than about links
    "profiler kernel time": 4 * 2**20, "torch.distributed, blocking": 64 * 2**20, "nccl-tests, blocking": 64 * 2**20,
}  # fmt: skip
SOURCES = {
    "aiconfigurator": "https://github.com/ai-dynamo/aiconfigurator", "vidur": "https://github.com/microsoft/vidur",
    "ml-engineering": "https://github.com/stas00/ml-engineering",
    "aws-nccl-tests": "https://github.com/awslabs/awsome-distributed-training",
    "issues": "https://github.com/NVIDIA/dgx-spark-playbooks/pull/103",
}  # fmt: skip
RANGE = 3  # powers of two of a range of message sizes
CELL = 8  # rows of one campaign, group and power of two that a fit takes at most


def read_collectives(path: Path) -> pd.DataFrame:
    """The rows of NCCL that belong to a node.

    Returns:
        node, kind, message (bytes), gpus, nodes, reduces (whether a switch could add them), seconds, source, version,
        launch, campaign; octave: the power of two nearest to its size; range: its range of sizes and group; taken:
        whether a fit takes it, one of many alike.

    Raises:
        UserError: the file cannot be read, or has other columns.
    """
    try:
        table = pd.read_parquet(path)
        several = table.n_nodes > 1
        made = pd.DataFrame(
            {
                "node": table.system.map(WITHIN).where(~several, table.system.map(ACROSS)),
                "kind": table.collective.replace("alltoall", "all_to_all"),
                "message": table.message_bytes.astype(float), "gpus": table.n_gpus.astype(float),
                "nodes": table.n_nodes.astype(float), "seconds": table.latency_s.astype(float),
                "reduces": table.dtype.isin(ADDED), "source": table.source,
                "version": table.library_version.fillna(""), "launch": table.launch,
            }
        )  # fmt: skip
        ours = (table.library == "nccl") & (table.algorithm == "auto") & made.node.notna()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a table of collectives ({error})") from None
    skewed = (made.message < made.launch.map(SKEW).fillna(0.0)) & (made.kind == "all_reduce") & (made.nodes == 1)
    return grouped_rows(made[ours & ~skewed].reset_index(drop=True))


def grouped_rows(made: pd.DataFrame) -> pd.DataFrame:
    """Rows with the columns that say which are alike: campaign, octave, range, taken."""
    made["campaign"] = (made.source + " " + made.version).str.strip()
    size = np.log2(made.message)
    made["octave"] = size.round()
    alike = made.groupby(["campaign", "node", "kind", "gpus", "nodes", "octave"]).message
    made["taken"] = alike.rank(method="first") % np.ceil(alike.transform("size") / CELL) == 0
    made["range"] = made.gpus.map("{:.0f} GPUs".format) + np.floor(size / RANGE).map(", range {:.0f}".format)
    return made


@cache
def node_file(slug: str) -> NodeFile:
    """A node as its file has it before the fit."""
    return files.load(slug)
