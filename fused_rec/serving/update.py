"""Folding of new interactions into the inputs of a served model."""

import dataclasses

from fused_rec.baselines.neighbors import item_counts
from fused_rec.config import Config
from fused_rec.data.dataset import Dataset
from fused_rec.data.splits import observe_all
from fused_rec.graph.edit import replace_interactions
from fused_rec.training.component_weights import Selection
from fused_rec.training.inputs import ModelInputs, trained_item_mask, unreached
from fused_rec.training.late_fusion import with_late_fusion


def with_dataset(config: Config, inputs: ModelInputs, dataset: Dataset, selection: Selection | None) -> ModelInputs:
    """Returns the inputs for a dataset that differs in its interactions alone, as `serving_inputs` would make them.

    Text features, social edges, text-kNN edges and attributes stay, and so do the parameters, which are of nodes. The
    edges of interactions, popularity and what late fusion computes from interactions are made anew.

    Args:
      config: all settings of the run.
      inputs: of the same tables with other interactions, all of them observed.
      dataset: tables with the same users, items, reviews and ties.
      selection: weights and settings of late fusion; None: the trained model alone.

    Returns:
      The inputs.
    """
    now = observe_all(dataset)
    observed = dataclasses.replace(inputs.observed, user=now.user, item=now.item, age=now.age)
    graph_inputs = dataclasses.replace(
        inputs.graph_inputs,
        graph=replace_interactions(inputs.graph_inputs.graph, now.user, now.item),
        trained_items=trained_item_mask(dataset, observed),
        popularity=item_counts(now.item, now.age, config.model.popularity_half_life, dataset.n_items),
    )
    updated = dataclasses.replace(inputs, dataset=dataset, observed=observed, graph_inputs=graph_inputs)
    unknown = {what: n for what, n in inputs.unknown.items() if what.startswith("ties")}
    updated = dataclasses.replace(updated, unknown=unknown | unreached(config.model, updated))
    return with_late_fusion(updated, selection)
