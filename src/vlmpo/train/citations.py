"""The papers behind each objective, for the model card."""

from __future__ import annotations

from collections.abc import Iterable

_MPO = """@article{wang2024mpo,
  title   = {Enhancing the Reasoning Ability of Multimodal Large Language Models via Mixed Preference Optimization},
  author  = {Wang, Weiyun and Chen, Zhe and Wang, Wenhai and Cao, Yue and Liu, Yangzhou and Gao, Zhangwei and Zhu, Jinguo and Zhu, Xizhou and Lu, Lewei and Qiao, Yu and Dai, Jifeng},
  journal = {arXiv preprint arXiv:2411.10442},
  year    = {2024}
}"""  # noqa: E501
_DPO = """@article{rafailov2023dpo,
  title   = {Direct Preference Optimization: Your Language Model is Secretly a Reward Model},
  author  = {Rafailov, Rafael and Sharma, Archit and Mitchell, Eric and Ermon, Stefano and Manning, Christopher D. and Finn, Chelsea},
  journal = {arXiv preprint arXiv:2305.18290},
  year    = {2023}
}"""  # noqa: E501
_BCO = """@article{jung2024bco,
  title   = {Binary Classifier Optimization for Large Language Model Alignment},
  author  = {Jung, Seungjae and Han, Gunsoo and Nam, Daniel Wontae and On, Kyoung-Woon},
  journal = {arXiv preprint arXiv:2404.04656},
  year    = {2024}
}"""

# By the terms that are on: a short name, what it is called in full, tags.
_NAMES: dict[frozenset[str], tuple[str, str, tuple[str, ...]]] = {
    frozenset({"sigmoid", "bco_pair", "nll"}): ("MPO", "Mixed Preference Optimization (MPO)", ("mpo",)),
    frozenset({"sigmoid", "nll"}): ("DPO+", "Direct Preference Optimization with an NLL term (DPO+)", ("dpo",)),
    frozenset({"sigmoid"}): ("DPO", "Direct Preference Optimization (DPO)", ("dpo",)),
    frozenset({"bco_pair", "nll"}): ("BCO+", "Binary Classifier Optimization with an NLL term (BCO+)", ("bco",)),
    frozenset({"bco_pair"}): ("BCO", "Binary Classifier Optimization (BCO)", ("bco",)),
    frozenset({"sigmoid", "bco_pair"}): ("DPO and BCO", "a mix of DPO and BCO without an NLL term", ("dpo", "bco")),
    frozenset({"nll"}): ("SFT", "supervised fine-tuning (SFT)", ("sft",)),
}


def method(terms: Iterable[str]) -> tuple[str, str, tuple[str, ...]]:
    """Short name, full name and tags of the objective with these ``terms`` on. It is MPO only with all three."""
    return _NAMES[frozenset(terms)]


def citations(terms: Iterable[str]) -> list[str]:
    """BibTeX of the papers whose terms are on; MPO's goes first where it is MPO."""
    on = set(terms)
    found = [(_MPO, {"sigmoid", "bco_pair", "nll"}), (_DPO, {"sigmoid"}), (_BCO, {"bco_pair"})]
    return [entry for entry, needed in found if needed <= on]
