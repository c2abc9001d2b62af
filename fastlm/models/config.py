"""The shape of a model as data."""

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from fastlm import positions
from fastlm.checks import below_one, flag, positive, whole
from fastlm.models.init import INITS
from fastlm.nn import ACTIVATIONS, NORMS
from fastlm.positions import frequencies

KINDS = ("decoder", "encoder", "encoder-decoder")
HEADS = ("lm", "detection", "none")
MAY_BE_ZERO = ("memory", "token_types", "conv_width", "pair_labels")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Transformer. Each field says below what it is; every one has a default.

    Raises:
        ValueError: for values that are out of range, unknown, or do not fit together, when it is made.
    """

    kind: Literal[KINDS] = "decoder"
    """A decoder sees what comes before (GPT), an encoder sees all (BERT); an encoder–decoder is one of each, the
    decoder attending to the encoder's states (T5, BART)."""
    vocab_size: int = 1024
    """Rows of the embedding; the tokenizer's size."""
    context: int = 128
    """Tokens a training row holds."""
    dim: int = 128
    """Width of the residual stream."""
    layers: int = 4
    """Blocks of attention and feed-forward layer; of an encoder–decoder, the decoder's."""
    encoder_layers: int | None = None
    """The encoder's blocks in an encoder–decoder; None for as many as layers."""

    heads: int = 4
    """Query heads; they must divide dim unless head_dim is given."""
    kv_heads: int | None = None
    """Key/value heads; None for as many as heads, fewer for grouped-query attention."""
    head_dim: int | None = None
    """Channels of a head; None for dim / heads."""
    attention_scale: float | None = None
    """Of the products of queries and keys; None for 1/√head_dim."""
    windows: tuple[int | None, ...] = ()
    """How many tokens away a query sees, for the layers in turn, None for all: (None, 128) has dense and banded layers
    alternate, as in GPT-3; () is dense throughout."""
    position: str = "rope"
    """A scheme of fastlm.positions, by its name in SCHEMES."""
    position_options: dict[str, Any] = field(default_factory=dict)
    """More arguments of the scheme, such as {"base": 500000.0}. A rotary scaling is data here too: {"scaling": {"kind":
    "yarn", "factor": 8.0, "original_context": 4096}}."""
    absolute_positions: bool = False
    """Whether learned positions are added to the embeddings besides (DeBERTa's position_biased_input)."""
    relative_segments: bool = False
    """Whether attention tells keys of a query's own token type from others (XLNet); there are as many types as one
    likes then, and none has an embedding where token_types is 0."""
    skip_padding: bool = False
    """Whether positions count real tokens alone where a mask says which are (RoBERTa)."""

    hidden: int | None = None
    """Width of the feed-forward layer; None for 4·dim, or 8/3·dim rounded up to a multiple of 32 when gated."""
    activation: str = "silu"
    """Of the feed-forward layer, by its name in fastlm.nn.ACTIVATIONS."""
    gated: bool = True
    """Whether the feed-forward layer is gated (SwiGLU, GEGLU)."""
    bias: bool = False
    """Biases in the linear layers and LayerNorms."""
    qkv_bias: bool | None = None
    """Biases of queries, keys and values; None for as bias says."""
    out_bias: bool | None = None
    """A bias of attention's output; None for as bias says."""
    key_bias: bool = True
    """Whether keys have a bias where queries and values do (not in DeBERTa v1)."""

    norm: Literal["layernorm", "rmsnorm"] = "rmsnorm"
    """Kind of every norm."""
    norm_place: Literal["pre", "post"] = "pre"
    """Of the input of each sublayer, or of the sum of each residual branch and the stream (BERT)."""
    norm_eps: float = 1e-5
    """Added to the variance, or to the mean square for rmsnorm."""
    norm_bias: bool | None = None
    """Biases of LayerNorms; None for as bias says."""
    final_norm: bool | None = None
    """Whether the last block's output is normed; None for where norms are "pre"."""
    embedding_norm: bool = False
    """Whether the sum of embeddings is normed (BERT, BLOOM)."""

    embedding_dim: int | None = None
    """Width of the embeddings, which a linear layer brings to dim (ALBERT); None for dim."""
    scale_embedding: bool = False
    """Whether token embeddings are multiplied by √dim."""
    token_types: int = 0
    """Kinds of segment with an embedding each (BERT's sentences A and B); 0 for none."""
    shared_groups: int | None = None
    """Layers share weights in so many groups of neighbours (ALBERT: 1); None for no sharing."""
    group_blocks: int = 1
    """Blocks of a layer, each with its own weights (ALBERT's inner_group_num)."""

    memory: int = 0
    """Tokens of the segments before that each layer attends to too (Transformer-XL, XLNet), in `new_recurrence`."""
    memory_reuse: int | None = None
    """How many of a segment's first tokens join the memory (XLNet's reuse_len); None for all."""
    two_streams: bool = False
    """Whether a second stream predicts tokens from their places (XLNet)."""
    conv_width: int = 0
    """Tokens that a convolution beside the first layer reads (DeBERTa v2: 3), an odd number; 0 for none."""
    conv_groups: int = 1
    """Groups of its channels."""
    conv_activation: str = "gelu"
    """Of what it gives, by its name in fastlm.nn.ACTIVATIONS."""

    head: Literal[HEADS] = "lm"
    """A token's probabilities, whether each token was replaced (ELECTRA's discriminator), or none."""
    head_transform: bool = False
    """Whether a linear layer, the activation and a norm come before the head's matrix (BERT)."""
    head_bias: bool = False
    """Whether the head's matrix has a bias."""
    tie_embeddings: bool = True
    """Whether the head's matrix is the embedding's."""
    scale_logits: bool = False
    """Whether the head reads states times 1/√dim (T5, with tied embeddings)."""
    mask_decoder: bool = False
    """Whether states end with DeBERTa's enhanced mask decoder, in which absolute positions enter: for pretraining. A
    model to fine-tune is the one without."""
    pooler: bool = False
    """Whether a linear layer and tanh make a row's state of its first token's, without labels (BERT's base model)."""
    pair_labels: int = 0
    """Labels of the head that reads the first token (BERT's next sentence, ALBERT's sentence order: 2); 0 for none."""

    dropout: float = 0.0
    """On the embeddings and on each residual branch while training; in [0, 1)."""
    embedding_dropout: float | None = None
    """On the embeddings; None for as dropout says."""
    attention_dropout: float = 0.0
    """On the attention's probabilities."""
    activation_dropout: float = 0.0
    """Inside the feed-forward layer."""
    final_dropout: float = 0.0
    """On each stack's output (T5)."""
    init: str = "gpt2"
    """How weights are drawn, by its name in fastlm.models.init.INITS."""

    def __post_init__(self):
        object.__setattr__(self, "windows", tuple(self.windows))
        for each in fields(self):
            self._check_type(each.name, each.type)
        if self.head_dim is None and self.dim % self.heads:
            raise ValueError(f"heads must divide dim; got dim {self.dim}, heads {self.heads}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads; got heads {self.heads}, kv_heads {self.kv_heads}")
        for name, known in _known().items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} {getattr(self, name)!r} is unknown; choose from {', '.join(sorted(known))}")
        self._check_together()
        self.make_position(causal=self.kind != "encoder")

    def _check_type(self, name: str, kind: type) -> None:
        value = getattr(self, name)
        if value is None and kind in (bool | None, int | None, float | None):
            return
        if kind in (bool, bool | None):
            flag(**{name: value})
        elif kind in (int, int | None):
            whole(0 if name in MAY_BE_ZERO else 1, **{name: value})
        elif name.endswith("dropout"):
            below_one(**{name: value})
        elif kind in (float, float | None):
            positive(**{name: value})

    def _check_together(self) -> None:
        for window in self.windows:
            if window is not None:
                whole(0, windows=window)
        if self.kind == "encoder-decoder" and self.memory:
            raise ValueError(f"memory is {self.memory}, and kind {self.kind!r}; a decoder or an encoder alone has one")
        if said := [name for name in self.position_options if name in positions.FACTS]:
            raise ValueError(f"position_options has {said[0]!r}, which other fields of the config say; leave it out")
        narrow = self.embedding_width != self.dim and self.tie_embeddings and self.head == "lm"
        if narrow and not self.head_transform:
            raise ValueError(
                f"a tied head reads states of embedding_dim {self.embedding_dim}, and dim is {self.dim}; "
                "give head_transform=True, or tie_embeddings=False"
            )
        if self.encoder_layers is not None and self.kind != "encoder-decoder":
            raise ValueError(f"encoder_layers is for an encoder-decoder, and kind is {self.kind!r}; give layers alone")
        if self.shared_groups is not None and self.layers % self.shared_groups:
            raise ValueError(f"shared_groups must divide layers; got {self.shared_groups} groups, {self.layers} layers")
        if self.kind != "encoder" and (self.conv_width or self.mask_decoder):
            raise ValueError(f"conv_width and mask_decoder are an encoder's, and kind is {self.kind!r}")
        if self.conv_width and self.mask_decoder and self.layers == 1:
            raise ValueError("conv_width acts after the first layer, and mask_decoder takes the last; give 2 layers")
        if self.two_streams and (self.kind != "encoder" or self.mask_decoder):
            raise ValueError("two_streams are an encoder's without mask_decoder; give kind='encoder'")
        if self.two_streams and positions.SCHEMES[self.position].embeds():
            raise ValueError(
                f"two_streams tell places apart in attention, and position {self.position!r} is added to embeddings; "
                "give one that acts in attention, such as 'transformer-xl'"
            )
        if self.conv_width and self.conv_width % 2 == 0:
            raise ValueError(f"conv_width is {self.conv_width}; give an odd number, as many tokens on either side")
        if self.mask_decoder and self.absolute_positions:
            raise ValueError("absolute_positions are in the embeddings already; give mask_decoder=False")
        if self.kind == "encoder-decoder" and (self.pair_labels or self.pooler or self.head == "detection"):
            raise ValueError("pooler, pair_labels and head='detection' read an encoder's states; give kind='encoder'")
        if self.pooler and self.pair_labels:
            raise ValueError("pair_labels have a pooler of their own; give pooler=False")

    @property
    def head_width(self) -> int:
        """Channels of a head: head_dim, or dim / heads."""
        return self.dim // self.heads if self.head_dim is None else self.head_dim

    @property
    def embedding_width(self) -> int:
        """Width of the embeddings: embedding_dim, or dim."""
        return self.dim if self.embedding_dim is None else self.embedding_dim

    @property
    def mlp_width(self) -> int:
        """Width of the feed-forward layer: hidden, or its default."""
        if self.hidden is not None:
            return self.hidden
        return -(-8 * self.dim // 96) * 32 if self.gated else 4 * self.dim

    @property
    def position_per_layer(self) -> bool:
        """Whether each layer has a scheme of its own."""
        return positions.SCHEMES[self.position].per_layer

    def make_shared_position(self) -> positions.SharedPart | None:
        """A new part of this config's position that the layers of a stack share; None where they share none."""
        return positions.make_shared(self.position, **self._facts() | self.position_options)

    def make_position(self, causal: bool) -> positions.Position:
        """A new scheme of this config's position, for a stack that hides later tokens or does not, or for one of its
        layers.
        """
        options = dict(self.position_options)
        if isinstance(options.get("scaling"), dict):
            options["scaling"] = frequencies.named(**options["scaling"])
        if issubclass(positions.SCHEMES[self.position], positions.LayerPosition):
            options["shared"] = True
        return positions.make(self.position, causal=causal, **self._facts() | options)

    def _facts(self) -> dict[str, int]:
        """What schemes are made from."""
        width = self.embedding_width if positions.SCHEMES[self.position].embeds() else self.dim
        return dict(dim=width, heads=self.heads, head_dim=self.head_width, context=self.context)


def _known() -> dict[str, object]:
    """Field → the values it may have."""
    return dict(
        kind=KINDS, norm=NORMS, norm_place=("pre", "post"), activation=ACTIVATIONS, conv_activation=ACTIVATIONS,
        position=positions.SCHEMES, head=HEADS, init=INITS,
    )  # fmt: skip
