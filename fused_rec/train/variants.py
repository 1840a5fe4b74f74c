"""What is compared: the settings that make each variant of a config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from fused_rec.config import Config


@dataclasses.dataclass(frozen=True)
class Variant:
    """overrides: settings by section. needs: "text", "ties", without which it would be another variant or nothing.

    control: trained on words or ties that say nothing; what it reaches is not for use.
    """

    description: str
    overrides: Mapping[str, Mapping[str, Any]]
    needs: tuple[str, ...] = ()
    control: bool = False


VARIANTS: dict[str, Variant] = {
    "fused": Variant("text inside the message passing", {}),
    "graph": Variant("without words", {"model": {"variant": "graph"}}, needs=("text",)),
    "text": Variant("words alone", {"model": {"variant": "text"}}, needs=("text",)),
    "no_ties": Variant("without ties", {"graph": {"ties": "none"}}, needs=("ties",)),
    "no_similar_text": Variant("without text neighbours", {"graph": {"similar_text": 0}}, needs=("text",)),
    "no_gates": Variant("relations weigh the same for every node", {"model": {"gates": False}}),
    "shuffled_text": Variant("another node's words", {"text": {"control": "shuffled"}}, ("text",), control=True),
    "random_text": Variant("random vectors for words", {"text": {"control": "random"}}, ("text",), control=True),
    "rewired_ties": Variant("other ties, same degrees", {"graph": {"ties": "rewired"}}, ("ties",), control=True),
}


def variant(config: Config, name: str) -> Config:
    """The config with the settings of one of `VARIANTS`. Raises ValueError, listing them, for another name."""
    if name not in VARIANTS:
        raise ValueError(f"variant is {name!r}; it must be one of {', '.join(VARIANTS)}")
    sections = {
        section: dataclasses.replace(getattr(config, section), **settings)
        for section, settings in VARIANTS[name].overrides.items()
    }
    return dataclasses.replace(config, **sections)
