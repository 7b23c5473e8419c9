"""A Ray cluster of two "nodes" on this machine: two raylets of two CPUs each, of little memory.

Each says it has two GPUs, of which Ray hands out the numbers whether or not they are there.

Writes its address, and ends when its standard input does, as it does with whoever started it. A
process of its own, since Ray warns while it is imported and leaves sockets to the collector.
"""

import os
import sys

from ray.cluster_utils import Cluster

OBJECT_STORE_BYTES = 80 * 2**20  # Ray's least is 75 MiB

if __name__ == "__main__":
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray refuses to have more than it names
    of_each = {"num_cpus": 2, "num_gpus": 2, "object_store_memory": OBJECT_STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**of_each, "include_dashboard": False})
    cluster.add_node(**of_each)
    cluster.wait_for_nodes()
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()
