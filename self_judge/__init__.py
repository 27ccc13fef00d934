"""SELF-JUDGE (arXiv 2402.11253): a model that judges its own samples and learns from them.

    from self_judge import SelfJudgeTrainer, get_batch_judgments, tournament_rejection_sampling

Names are imported when they are first used, so that `import self_judge` is quick.
"""

import importlib

_HOMES = {
    "JudgeAugmentedSFTCollator": "collators",
    "SelfJudgeCollator": "collators",
    "get_conditional_labels": "collators",
    "SelfJudgeTrainer": "trainer",
    "PeftSavingCallback": "trainer",
    "get_batch_judgments": "judgment",
    "tournament_rejection_sampling": "tournament",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'self_judge' has no attribute {name!r}")
    return getattr(importlib.import_module(f"self_judge.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
