"""Kinds of tensors in words for people who train nothing: what each is called, and what it says of a client's data."""

from __future__ import annotations

WORDS = {
    "A": "down factors A",
    "B": "up factors B",
    "C": "cores C",
    "H": "heads of the cores H",
    "E": "experts E, which are cores",
    "T": "token projections T of a mixture's router",
    "gain": "gains of the cores' heads",
    "head": "the task head",
    "norm": "LayerNorms",
    "index": "which rows, columns, ranks or labels are meant",
    "control": "control variates",
    "base": "dense changes of the frozen weights",
    "token": "what the router looks for, on average, in a mixture's layers",
    "embedding": "what each expert makes of a layer's mean input",
    "condensed": "made-up examples, condensed from the client's own",
    "logits": "mean logits of each label",
    "soft": "mean answers for each label",
}
TELLS = {
    "A": "Its change is a sum of what the model sees in the client's own examples: the most direct trace of inputs.",
    "B": "Its change mixes traces of the client's inputs with the mistakes that the model made on them.",
    "C": "A trace of the client's inputs, as far as the two factors around it let it through.",
    "H": "A trace of the client's inputs, as far as the two factors around it let it through.",
    "E": "A trace of the client's inputs, as far as the two factors around it let it through.",
    "T": "Its change is a sum of what the model sees in the client's own examples.",
    "gain": "One number a head: how much the client's examples wanted of it.",
    "head": "Its change tells which labels the client's examples have.",
    "norm": "Sums over all of the client's inputs, a few numbers a layer.",
    "index": "Which directions mattered most for the client's examples, or which labels they have.",
    "control": "An average of the client's own gradients: as telling as the tensors it is named after.",
    "base": "The sum of all changes so far.",
    "token": "A few projections of the mean of the client's validation examples, which no noise covers.",
    "embedding": "A few projections of the mean of the client's validation examples, which no noise covers.",
    "condensed": "Where the client's examples of each label lie; of a label with one example, that example.",
    "logits": "What the server's model says of the client's examples of each label, on average.",
    "soft": "What the server's model says of the client's examples of each label, on average.",
}
SKETCHED = {
    "statistics": (
        "class statistics",
        "for each label: how many examples, the mean of their features; and one covariance of all features",
        "Which labels the client has, how many examples of each, and where their features lie.",
    ),
    "mixtures": (
        "class mixtures",
        "for each label: how many examples, and a mixture of Gaussians fitted to their features",
        "Which labels the client has, how many examples of each, and where their features lie, in some detail.",
    ),
    "counts": (
        "class counts",
        "how many examples of each label",
        "Which labels the client has, and how many examples of each.",
    ),
    "gradients": (
        "weight gradients",
        "the dense gradient of each adapted layer on some of the client's examples",
        "Of few examples, a dense gradient can give the examples themselves away.",
    ),
}
