"""What goes as one piece: entries of one tensor (`tensors`), or what is coupled across the network (`coupled`)."""

from lightning_prune.core.granularities.coupled import Channel as Channel
from lightning_prune.core.granularities.coupled import Head as Head
from lightning_prune.core.granularities.coupled import Layer as Layer
from lightning_prune.core.granularities.tensors import Block as Block
from lightning_prune.core.granularities.tensors import Kernel as Kernel
from lightning_prune.core.granularities.tensors import Slice as Slice
from lightning_prune.core.granularities.tensors import Weight as Weight
