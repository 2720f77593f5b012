"""The names under which an optimizer's state is saved, by who has the same: every rank, no other rank, or no file."""

from __future__ import annotations

from onebit.optim.lamb import STARTS
from onebit.optim.local_steps import KEPT, MEAN, RATE, START

STEP, VARIANCE_STEP = "step", "variance_step"
MOMENTUM, VARIANCE, FRESH_VARIANCE, MASTER = "exp_avg", "exp_avg_sq", "exp_avg_sq_fresh", "master"
ADAM = (STEP, MOMENTUM, VARIANCE)  # what torch's own Adam and AdamW keep of every parameter

# What a parameter's state may hold, by its form: one number; a tensor shaped as the parameter; a Python float.
COUNTS = frozenset({STEP, VARIANCE_STEP})
SCALARS = frozenset(STARTS)
SHAPED = frozenset({MOMENTUM, VARIANCE, FRESH_VARIANCE, MASTER, MEAN, START})
FLOATS = frozenset({RATE, KEPT})

# What only one optimizer keeps of a parameter.
INTERVAL = frozenset({MEAN, START, RATE, KEPT})
LAYERWISE = frozenset({FRESH_VARIANCE, *STARTS})

DECOUPLED = "decoupled_weight_decay"  # torch's name of the option adamw_mode, in the groups of every state of Adam's

EXTRA = "onebit"  # under which a state_dict has everything that torch's own optimizers do not have
FORMAT = 1  # the version of that
VERSION, SKIPPED_STEPS, LEFT_OUT_STEPS, RESIDUALS = "version", "skipped_steps", "left_out_steps", "residuals"
OPTIMIZER = "optimizer"  # the algorithm that has written the state
SLICES = "slices"  # there where each rank of a node has a slice of what is shaped as the parameters

# 1. Always: bit-equal on every rank, so one rank's are enough; of what is in slices one rank's in every node.
ALWAYS = frozenset({*COUNTS, *SCALARS, *FLOATS, *SHAPED, VERSION, OPTIMIZER, SKIPPED_STEPS}) - {MEAN}
# 2. Per rank: each rank has its own to save; the momentum only while an interval of local steps is open.
PER_RANK = frozenset({RESIDUALS, LEFT_OUT_STEPS, MEAN, SLICES})
PER_RANK_IN_INTERVAL = frozenset({MOMENTUM, MEAN})
# 3. Never saved: attributes of an optimizer that are options of its constructor, or are made anew when first needed.
NEVER_SAVED = frozenset(
    {
        "_agreed",
        "_backend",
        "_bucket_mb",
        "_check_every",
        "_codec",
        "_dead",
        "_default_bucket_mb",
        "_fused",
        "_layers",
        "_left_out",
        "_levels",
        "_lent",
        "_loaded",
        "_local_group",
        "_locals",
        "_looked_up",
        "_overlap",
        "_packed",
        "_reducers",
        "_right_options",
        "_shard",
        "_sliced",
        "_spec",
        "_steps",
        "_told",
        "averager",
        "gradients_averaged",
    }
)
