"""SimpleRNN compared with self-attention in six aspects."""

from collections.abc import Mapping

from . import resources, synthetic
from .aspects import Measurement

MEASUREMENTS: Mapping[str, Measurement] = {
    "parallelism": resources.measure_parallelism,
    "recall": synthetic.measure_recall,
    "distance": synthetic.measure_distance,
    "memory": resources.measure_memory,
    "cost": resources.measure_cost,
    "communication": resources.measure_communication,
    "corpus": resources.measure_corpus,
}
