def sub(p, *pairs):
    s=open(p).read()
    for a,b in pairs:
        assert s.count(a)==1,(p,s.count(a),a)
        s=s.replace(a,b)
    open(p,'w').write(s)
sub('fused_rec/config.py',
('''    edge_dropout: float = 0.0  # fraction''','''    # weight of the InfoNCE loss between final embeddings and projected text, in any variant (RLMRec-Con); 0 = none
    text_alignment: float = 0.0
    edge_dropout: float = 0.0  # fraction'''),
('''        for name in ("popularity_weight", "popularity_half_life"):''','''        for name in ("popularity_weight", "popularity_half_life", "text_alignment"):'''),
('''        """Whether text is an input, and so must be encoded."""
        return self.variant != "graph"
''','''        """Whether text is an input."""
        return self.variant != "graph"

    @property
    def reads_text(self) -> bool:
        """Whether text is an input or aligned with embeddings, and so must be encoded."""
        return self.uses_text or self.text_alignment > 0
'''),
('''        return dataclasses.replace(self, variant="text", late_fusion=False)''','''        return dataclasses.replace(self, variant="text", late_fusion=False, text_alignment=0.0)'''),
('''        return self.model.uses_text and self.text.features != "random"''','''        return self.model.reads_text and self.text.features != "random"'''),
)
sub('fused_rec/training/inputs.py',('    if not config.model.uses_text or not texts.texts:','    if not config.model.reads_text or not texts.texts:'))
sub('fused_rec/runs/model_card.py',('in_markdown(config["text"]["model"]) if model.uses_text else','in_markdown(config["text"]["model"]) if model.reads_text else'))
sub('fused_rec/model/model.py',
('''LINEAR = "linear"''','''ALIGNED_TEXT = "aligned_text"  # projected text of users and items, to which model.text_alignment draws embeddings
LINEAR = "linear"'''),
('''        out = combine_layers(weights, layers)
''','''        if self.config.text_alignment:
            project = TextMLP(self.config.dim, self.compute_dtype, name="alignment")
            views = (USER, project(mean_item_text(graph))), (ITEM, project(graph.text[ITEM]))
            self.sow("intermediates", ALIGNED_TEXT, tuple(graph.all_gather(t, view) for t, view in views))
        out = combine_layers(weights, layers)
'''),
)
sub('fused_rec/training/train_step.py',
('''CONTRAST_TEMPERATURE =''','''ALIGNMENT_TEMPERATURE = 0.2  # of RLMRec-Con (Ren et al., WWW 2024, arXiv 2310.15950) on Amazon and Yelp
CONTRAST_TEMPERATURE ='''),
('''      `loss/contrastive_user` and `loss/contrastive_item`, weighted, of the first branch. The sum over devices completes
      the means.
''','''      `loss/contrastive_user` and `loss/contrastive_item`, weighted, of the first branch; with model.text_alignment
      `loss/alignment_user` and `loss/alignment_item` alike. The sum over devices completes the means.
'''),
('''    if config.train.contrastive_weight:
        [first_layer] = intermediates["intermediates"]["main"][FIRST_LAYER]
        for node_type, (total, count) in zip(
            (USER, ITEM), _contrastive_losses(branches[0], first_layer, batch), strict=True
        ):
            shares.append(_mean(config.train.contrastive_weight * total, count))
            parts[f"loss/contrastive_{node_type}"] = shares[-1]
    return''','''    for name, view, weight, temperature in (
        ("contrastive", FIRST_LAYER, config.train.contrastive_weight, CONTRAST_TEMPERATURE),
        ("alignment", ALIGNED_TEXT, config.model.text_alignment, ALIGNMENT_TEMPERATURE),
    ):
        if weight:
            [other] = intermediates["intermediates"]["main"][view]
            found = _contrastive_losses(branches[0], other, batch, temperature, skip_zeros=view == ALIGNED_TEXT)
            for node_type, (total, count) in zip((USER, ITEM), found, strict=True):
                shares.append(_mean(weight * total, count))
                parts[f"loss/{name}_{node_type}"] = shares[-1]
    return'''),
('''def _contrastive_losses(vectors: Vectors, first_layer: Vectors, batch: Batch) -> list[losses.Sum]:
    """InfoNCE of the batch's users, and of one positive of each, against those of all devices.

    XSimGCL's batch is of user-item pairs; one pair per user gives the same size for both and B^2 cosines.
    """''','''def _contrastive_losses(
    vectors: Vectors, others: Vectors, batch: Batch, temperature: float, skip_zeros: bool
) -> list[losses.Sum]:
    """InfoNCE of the batch's users, and of one positive of each, against those of all devices.

    XSimGCL's batch is of user-item pairs; one pair per user gives the same size for both and B^2 cosines. With
    `skip_zeros`, nodes whose second view is zero, having no text, take no part.
    """'''),
('''    valid = mask[:, 0]
    sums = []
    for one, other, nodes in zip(vectors, first_layer, (user, items[:, 0]), strict=True):
        everyone''','''    sums = []
    for one, other, nodes in zip(vectors, others, (user, items[:, 0]), strict=True):
        valid = mask[:, 0] * jnp.any(other[nodes] != 0, axis=1) if skip_zeros else mask[:, 0]
        everyone'''),
('''nodes, valid, everyone, CONTRAST_TEMPERATURE))''','''nodes, valid, everyone, temperature))'''),
('''from fused_rec.model.model import (
    FIRST_LAYER''','''from fused_rec.model.model import (
    ALIGNED_TEXT,
    FIRST_LAYER'''),
)
sub('fused_rec/studies/variants.py',
('''    "text_propagation": "to_users",
    "user_id''','''    "text_propagation": "to_users",
    "text_alignment": 0.0,
    "user_id'''),
('''
VARIANTS: dict''','''# LightGCN's settings with layers, edge dropout, weight and temperature of the alignment as published for Amazon and Yelp
# (github.com/HKUDS/RLMRec). What differs: a language model's profiles of users and items are replaced by the text
# features of items and their mean over a user's items; the MLP's hidden layer has half of their width; the denominator
# has the users, and one positive of each, of the batch, where the paper has all users and also a term of negatives.
RLMREC_MODEL = PLAIN_MODEL | {"num_layers": 3, "edge_dropout": 0.2, "text_alignment": 0.01}

VARIANTS: dict'''),
('''    "alpharec": Variant(
''','''    "rlmrec_con": Variant(
        "RLMRec-Con (Ren et al., 2024, arXiv 2310.15950)",
        {
            "model": RLMREC_MODEL,
            "text": FROZEN,
            "graph": PLAIN_GRAPH,
            "train": BPR | {"learning_rate": 0.01, "weight_decay": 0.1},
        },
        needs=("text",),
    ),
    "alpharec": Variant(
'''),
)
sub('tests/test_variants.py',
('''def moved(params)''','''def test_rlmrec_scores_as_lightgcn_does():
    config, graph_inputs = config_of("rlmrec_con"), task_of("rlmrec_con")
    params = init(config, graph_inputs).params
    assert set(params["main"]) == {"id_user", "id_item", "alignment"}
    h = sum(rounds_of(params)) / 4
    users, items = embed_nodes(config, params, graph_inputs)
    np.testing.assert_allclose(users @ items.T, h[:USERS] @ h[USERS:].T, rtol=1e-5, atol=1e-5)


def test_the_alignment_by_hand():
    """Cosines of final embeddings and projected text over each user and item of the batch, at temperature .2."""
    config = config_of("rlmrec_con")
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, edge_dropout=0.0, text_alignment=0.5))
    params = init(config, task_of("rlmrec_con")).params
    h = sum(rounds_of(params)) / 4
    layers = params["main"]["alignment"]
    text = item_and_mean_text() @ layers["hidden"]["kernel"] + layers["hidden"]["bias"]
    text = np.where(text > 0, text, 0.01 * text) @ layers["output"]["kernel"] + layers["output"]["bias"]
    users, items = batch_of(0).users, batch_of(0).items[:, 0]
    sets = np.unique(users), np.unique(USERS + items)
    alignment = sum(cosine_contrast(h, text, nodes, 0.2) for nodes in sets)
    for devices in (1, 2):
        [found] = steps(config, devices, 1, "rlmrec_con")[0]
        parts = found["loss/alignment_user"] + found["loss/alignment_item"]
        assert parts == pytest.approx(0.5 * alignment, rel=1e-5)
        assert found["loss/main"] + parts == pytest.approx(found["loss"], rel=1e-6)


def test_nodes_without_text_are_not_aligned():
    """Without any text there is nothing to align with, and the loss is that of LightGCN."""
    config, graph_inputs = config_of("rlmrec_con"), task_of("rlmrec_con")
    blank = {ITEM: np.zeros_like(graph_inputs.graph.text[ITEM])}
    graph_inputs = dataclasses.replace(graph_inputs, graph=graph_inputs.graph.with_text(blank))
    whole = init(config, graph_inputs)
    _, found = parallel_train_step(config, 1)(shard_state(whole, 1), shard_graph_inputs(graph_inputs, 1), batch_of(0))
    assert found["loss/alignment_user"] == found["loss/alignment_item"] == 0
    assert found["loss"] == found["loss/main"]


def item_and_mean_text() -> np.ndarray:
    """The mean text of each user's items, then the text of each item."""
    text, held = tiny.words()[USERS : USERS + ITEMS], np.zeros((USERS, ITEMS))
    held[tiny.HOLDER, tiny.HELD] = 1
    return np.concatenate([held @ text / np.maximum(held.sum(1, keepdims=True), 1), text])


def moved(params)'''),
('''    text, held = tiny.words()[USERS : USERS + ITEMS], np.zeros((USERS, ITEMS))
    held[tiny.HOLDER, tiny.HELD] = 1
    inputs = np.concatenate([held @ text / np.maximum(held.sum(1, keepdims=True), 1), text])
''','''    inputs = item_and_mean_text()
'''),
('''def cosine_contrast(one: np.ndarray, other: np.ndarray, nodes: np.ndarray) -> float:''','''def cosine_contrast(one: np.ndarray, other: np.ndarray, nodes: np.ndarray, temperature: float = 0.15) -> float:'''),
('''    scores = np.exp(one @ other.T / 0.15)''','''    scores = np.exp(one @ other.T / temperature)'''),
('''"xsimgcl", "alpharec"])
def test_published''','''"xsimgcl", "alpharec", "rlmrec_con"])
def test_published'''),
('''            text_propagation="both_ways",
        ),''','''            text_propagation="both_ways",
            text_alignment=0.3,
        ),'''),
)
