"""The files that a user names for the model: its profile and its plan of widths."""

from functools import lru_cache

from vllm.config import VllmConfig

from quantpress.cache.engine_memory import planned_widths
from quantpress.cache.saved.model_profile import ModelProfile
from quantpress.cache.saved.width_plan import WidthPlan
from quantpress.engines.vllm.options import Options, options_of


def profile_of(config: VllmConfig) -> ModelProfile | None:
    """The model's profile that the user names, or None.

    Raises:
        CacheFileError: the file is no profile, or one of another model.
        InvalidInputError: an option is unknown, or its value makes no sense.
    """
    path = _options(config).profile
    if path is None:
        return None
    profile = _loaded(path)
    profile.check(config.model_config.hf_text_config)
    return profile


def plan_of(config: VllmConfig) -> WidthPlan | None:
    """The plan of widths that the user names, or None; a draft model has none.

    Raises:
        CacheFileError: the file is no plan, or one of another model.
        InvalidInputError: an option is unknown, its value makes no sense, or the plan lacks a layer, or has
            widths by head or one that the kernels do not read.
    """
    path, model = _options(config).plan, config.model_config
    if path is None or model.runner_type == "draft":
        return None
    plan = WidthPlan.load(path)
    plan.check(model.hf_text_config)
    planned_widths(plan, range(model.get_total_num_hidden_layers()))
    return plan


def _options(config: VllmConfig) -> Options:
    return options_of(config.additional_config, config.scheduler_config.max_num_seqs)


@lru_cache(maxsize=2)
def _loaded(path: str) -> ModelProfile:
    return ModelProfile.load(path)
