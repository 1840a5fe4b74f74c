"""Named random streams: every purpose of random draws, and the NumPy generators of a seed.

Draws of different purposes must not repeat each other, so each purpose has a number of its own in `Stream`. NumPy draws
of training use (seed, step, stream) as entropy; keys of JAX fold the stream in. Draws of one purpose that are numbered
anew for each table, group or matrix use (seed, number). This module does without JAX, as the data packages do.
"""

import enum

import numpy as np


class Stream(enum.IntEnum):
    """Purposes of random draws. Values are part of every result: a change of one changes what a seed gives."""

    # NumPy, third number of the entropy
    BATCH_ORDER = 0  # permutation of the users of an epoch; its step is the epoch
    BATCH_SAMPLES = 1  # positives and negatives of a step
    NEIGHBORS = 2  # sampled edges of a step
    SHUFFLED_TEXTS = 2  # coincides with NEIGHBORS at step 0; other values would change published controls
    RANDOM_TEXTS = 3
    REWIRED_TIES = 4
    FINETUNE_TEXTS = 5  # texts of a step whose encoder is trained
    FUSION_USERS = 6  # validation users on which late fusion is selected
    TERM_SIGNS = 7  # signs of terms that share columns, one draw for all runs
    # JAX, folded into the key of a step; ID dropout folds in the index of the node type, which is below
    EDGE_DROPOUT = 1_000
    EMBEDDING_NOISE = 1_001


def numpy_rng(seed: int, step: int, stream: Stream) -> np.random.Generator:
    """Builds the generator of one purpose at one step.

    Args:
      seed: train.seed, or another seed of the run.
      step: the step, the epoch, or 0 for what is drawn once.
      stream: the purpose.

    Returns:
      A generator, equal for equal arguments.
    """
    return np.random.default_rng((seed, step, int(stream)))


def numbered_rng(seed: int, number: int) -> np.random.Generator:
    """Builds the generator of one of several parts that are drawn independently, such as tables or matrices.

    Args:
      seed: the seed of the whole.
      number: the number of the part.

    Returns:
      A generator, equal for equal arguments.
    """
    return np.random.default_rng((seed, number))
