"""The memory update rules by the name that ``ModelConfig.update_rule`` gives them."""

from mom_jax.update_rules.gated_delta import GatedDelta

UPDATE_RULES = {"gated_deltanet": GatedDelta}
