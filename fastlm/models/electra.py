"""A generator of likely tokens, and a discriminator that tells which ones it put in (Clark et al. 2020, ELECTRA)."""

from dataclasses import replace
from typing import Literal

from torch import nn

from fastlm.checks import one_of
from fastlm.models.config import ModelConfig
from fastlm.models.deberta import DisentangledEmbedding
from fastlm.models.transformer import Transformer

SHARING = ("shared", "disentangled", "none")


class Electra(nn.Module):
    """A generator and a discriminator that are trained together.

    Args:
        generator: the generator's shape, with head "lm".
        discriminator: the discriminator's shape, with head "detection" and as wide an embedding.
        sharing: of embeddings. "shared": one for both, of tokens, types and positions, with their norm, trained by both
            (ELECTRA). "disentangled": the discriminator's token embedding is the generator's, which it does not train,
            plus a difference (DeBERTa v3; He et al. 2023, sec. 3.3). "none": each has its own. Default "shared".

    Attributes:
        generator, discriminator: a `Transformer` each.

    Raises:
        ValueError: for embeddings that are not of one shape, unless nothing is shared.
    """

    def __init__(self, generator: ModelConfig, discriminator: ModelConfig, sharing: Literal[SHARING] = "shared"):
        super().__init__()
        one_of(SHARING, sharing=sharing)
        shapes = [(c.vocab_size, c.embedding_width) for c in (generator, discriminator)]
        if sharing != "none" and shapes[0] != shapes[1]:
            raise ValueError(
                f"the generator's embedding is {list(shapes[0])} and the discriminator's {list(shapes[1])}; "
                "give both one vocab_size and embedding_dim, or sharing='none'"
            )
        self.generator, self.discriminator = Transformer(generator), Transformer(discriminator)
        if sharing == "shared":
            self._share()
        elif sharing == "disentangled":
            self.discriminator.embedding = DisentangledEmbedding(self.generator.embedding)

    def _share(self) -> None:
        """Give the discriminator the generator's embeddings, of positions too where the scheme adds to them."""
        mine, theirs = self.discriminator, self.generator
        mine.embedding = theirs.embedding
        mine.encoder.types, mine.encoder.embedding_norm = theirs.encoder.types, theirs.encoder.embedding_norm
        if mine.encoder.position is not None and mine.encoder.position.embeds():
            mine.encoder.position = theirs.encoder.position

    def exported(self) -> Transformer:
        """The discriminator, to fine-tune; a copy whose embedding is the sum, where that is disentangled."""
        mine = self.discriminator
        if not isinstance(mine.embedding, DisentangledEmbedding):
            return mine
        state = mine.state_dict() | {"embedding.weight": mine.embedding.weight}
        del state["embedding.delta"]
        alone = Transformer(mine.config).to(mine.embedding.delta.device)
        alone.load_state_dict(state)
        return alone.train(self.training)


def generator_config(
    discriminator: ModelConfig, width: float = 0.25, depth: float = 1.0, **changes: object
) -> ModelConfig:
    """The shape of a discriminator's generator: heads as wide, and fewer.

    Args:
        discriminator: the discriminator's shape.
        width: the generator's dim over the discriminator's. Default 1/4, as in ELECTRA-small and -large.
        depth: the generator's layers over the discriminator's. Default 1; half in DeBERTa v3.
        changes: fields of `ModelConfig` with other values.

    Returns:
        The generator's ModelConfig; its embedding is as wide as the discriminator's.
    """
    d = discriminator
    heads = max(1, round(width * d.heads))
    dim = heads * d.head_width if d.head_dim is None else round(width * d.dim)
    fields = dict(
        head="lm", pair_labels=0, layers=max(1, round(depth * d.layers)), dim=dim, heads=heads,
        hidden=None if d.hidden is None else round(width * d.hidden),
        embedding_dim=None if d.embedding_width == dim else d.embedding_width,
    )  # fmt: skip
    return replace(d, **fields | changes)
