"""Tables of which ranks hold rows: the loss and the embedding are as right as in one process, and gradients lie where
the table does.
"""

import pytest
import torch
import torch.distributed as dist
from lost import OPTIONS, ULPS, Drawn, assert_loss_accurate, draw, results, yardstick
from sharded import mesh_of, on
from tolerance import Yardstick, assert_accurate, max_and_rms
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import fastlm

WORDS = 91  # 46 and 45 on two ranks; 31, 31 and 29 on three


def divided(drawn: Drawn, mesh, placements) -> Drawn:
    weight, bias = (None if x is None else distribute_tensor(x, mesh, placements) for x in drawn[1:3])
    return drawn._replace(weight=weight, bias=bias)


def losses_agree(rank, world, dtype, options, backend):
    mesh, drawn = mesh_of(world), draw(dtype, V=WORDS)
    for reduction in ("none", "sum"):
        against = yardstick(drawn, reduction, options)
        ours = lambda *a, reduction=reduction, **o: fastlm.linear_cross_entropy(*a, reduction=reduction, **o)
        with fastlm.use_backend(backend):
            made = results(ours, divided(drawn, mesh, [Shard(0)]), **options)
        for name, got in made.items():
            if isinstance(got, DTensor):
                assert name in ("dweight", "dbias") and got.placements == (Shard(0),)
                got = got.full_tensor()
            assert_accurate(name, got, against, ulps=ULPS)


@on(2, 3)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_loss_and_its_gradients(ranks, options):
    ranks.run(losses_agree, torch.float32, options, None)


@on(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_by_the_definition(ranks, dtype):
    ranks.run(losses_agree, dtype, OPTIONS["all"], "reference")


def chunks_are_the_same_rows(rank, world):
    from fastlm.ops import logits

    before, logits.CPU = logits.CPU, logits.Chunk(4 * 46 * 5, 1, share=100)
    try:
        losses_agree(rank, world, torch.float32, OPTIONS["all"], None)
    finally:
        logits.CPU = before


@on(2)
def test_in_chunks_that_uneven_parts_would_cut_apart(ranks):
    ranks.run(chunks_are_the_same_rows)


def same_bits(rank, world):
    mesh, drawn = mesh_of(world), draw(torch.float32, V=WORDS)
    made = [
        results(lambda *a: fastlm.linear_cross_entropy(*a, reduction="sum"), divided(drawn, mesh, [Shard(0)]))
        for _ in range(3)
    ]
    for name in ("loss", "dhidden"):
        everywhere = [torch.empty_like(made[0][name]) for _ in range(world)]
        dist.all_gather(everywhere, made[0][name])
        assert all(torch.equal(other, made[0][name]) for other in (*everywhere, *(m[name] for m in made))), name


@on(2, 3)
def test_every_rank_gets_the_same_bits_every_time(ranks):
    ranks.run(same_bits)


def means_without_gradients(rank, world):
    mesh, drawn = mesh_of(world), draw(torch.float32, V=WORDS)
    parts = divided(drawn, mesh, [Shard(0)])
    call = lambda d: fastlm.linear_cross_entropy(d.hidden, d.weight, d.labels, d.bias, label_smoothing=0.1)
    torch.testing.assert_close(call(parts), call(drawn))
    whole = divided(drawn, mesh, [Replicate()])
    assert torch.equal(call(whole), call(drawn))


@on(2)
def test_a_mean_that_nobody_learns_from_and_a_table_that_is_whole(ranks):
    ranks.run(means_without_gradients)


def on_a_mesh_of_two_dimensions(rank, world):
    mesh, drawn = mesh_of(2, 2), draw(torch.float32, V=WORDS)
    against = yardstick(drawn, "none", {})
    parts = divided(drawn, mesh, [Replicate(), Shard(0)])
    hidden, labels = (distribute_tensor(x, mesh, 2 * [Replicate()]) for x in (drawn.hidden, drawn.labels))
    leaves = [x.detach().requires_grad_() for x in (hidden, parts.weight, parts.bias)]
    loss = fastlm.linear_cross_entropy(leaves[0], leaves[1], labels, leaves[2], reduction="none")
    assert loss.placements == (Replicate(), Replicate())
    weights = distribute_tensor(torch.linspace(0.5, 1.5, len(labels)), mesh, 2 * [Replicate()])
    made = (loss.detach(), *torch.autograd.grad((loss * weights).sum(), leaves))
    for name, got in zip(("loss", "dhidden", "dweight", "dbias"), made, strict=True):
        assert_accurate(name, got.full_tensor(), against, ulps=ULPS)


@on(4)
def test_states_that_are_dtensors_on_a_mesh_of_two_dimensions(ranks):
    ranks.run(on_a_mesh_of_two_dimensions)


def embeddings_agree(rank, world, padding):
    mesh, g = mesh_of(world), torch.Generator().manual_seed(0)
    ids, weight = torch.randint(WORDS, (5, 8), generator=g), torch.randn(WORDS, 6, generator=g)
    dy = torch.randn(5, 8, 6, generator=g)

    def made(function, weight, ids):
        weight = weight.detach().requires_grad_()
        y = function(ids, weight, padding)
        given = dy.to(y.dtype) if not isinstance(y, DTensor) else distribute_tensor(dy, mesh, y.placements)
        return {"y": y.detach(), "dweight": torch.autograd.grad(y, weight, given)[0]}

    truth = made(torch.nn.functional.embedding, weight.double(), ids)
    plain = made(torch.nn.functional.embedding, weight, ids)
    against = Yardstick(truth, {name: max_and_rms(x, truth[name]) for name, x in plain.items()})
    for tokens in (ids, distribute_tensor(ids, mesh, [Replicate()])):
        got = made(fastlm.embedding, distribute_tensor(weight, mesh, [Shard(0)]), tokens)
        assert got["dweight"].placements == (Shard(0),) and isinstance(got["y"], DTensor) == (tokens is not ids)
        for name, x in got.items():
            assert_accurate(name, x.full_tensor() if isinstance(x, DTensor) else x, against)
    with pytest.raises(IndexError, match="ids hold 91; give 0 to 90"):
        fastlm.embedding(torch.tensor([91]), distribute_tensor(weight, mesh, [Shard(0)]))


@on(2, 3)
@pytest.mark.parametrize("padding", [None, 3, -1])
def test_an_embedding(ranks, padding):
    ranks.run(embeddings_agree, padding)


def tied(rank, world):
    """One table, read and guessed with, on two layers of plain PyTorch: gradients add up in its shards."""
    mesh, drawn = mesh_of(world), draw(torch.float32, V=WORDS)
    ids = drawn.labels.clamp(min=0)
    grads = []
    for weight in (drawn.weight, distribute_tensor(drawn.weight, mesh, [Shard(0)])):
        weight = torch.nn.Parameter(weight)
        states = fastlm.embedding(ids, weight).tanh()
        fastlm.linear_cross_entropy(states, weight, drawn.labels).backward()
        grads.append(weight.grad)
    assert grads[1].placements == (Shard(0),)
    torch.testing.assert_close(grads[1].full_tensor(), grads[0])


@on(2, 3)
def test_a_table_that_is_read_and_guessed_with(ranks):
    ranks.run(tied)


def refused(rank, world):
    mesh, drawn = mesh_of(world), draw(torch.float32, V=WORDS)
    parts = divided(drawn, mesh, [Shard(0)])
    rows = distribute_tensor(drawn.hidden, mesh, [Shard(0)])
    sums = DTensor.from_local(drawn.hidden, mesh, [Partial()])
    columns = distribute_tensor(drawn.weight, mesh, [Shard(1)])
    few = distribute_tensor(torch.randn(world - 1, 24), mesh, [Shard(0)])
    h, w, labels, b = drawn.hidden, parts.weight, drawn.labels, parts.bias
    for call, words in (
        ((h, columns, labels), r"weight lies as \(Shard\(dim=1\),\); give it divided by rows over one mesh dimension"),
        ((rows, w, labels), r"hidden lies as \(Shard\(dim=0\),\), and every rank must hold all of it"),
        ((sums, w, labels), "hidden lies as .*Partial"),
        ((h, w, labels, drawn.bias), "bias is no DTensor and weight as"),
        ((h, drawn.weight, labels, b), r"bias is a DTensor and weight is none; give bias.full_tensor\(\)"),
        ((rows, drawn.weight, labels), r"hidden is a DTensor, and weight is none on its mesh"),
        ((h, few, labels.clamp(max=0)), f"{world - 1} words over {world} ranks leave some without any"),
        ((h, w, labels.clamp(min=WORDS)), "labels hold 91; give 0 to 90"),
    ):
        with pytest.raises(ValueError, match=words):
            fastlm.linear_cross_entropy(*call)
    with pytest.raises(ValueError, match="weight lies as"):
        fastlm.embedding(labels.clamp(min=0), columns)


@on(2, 3)
def test_what_is_refused(ranks):
    ranks.run(refused)


def test_one_process_is_the_yardstick_itself():
    drawn = draw(torch.float32, V=WORDS)
    assert_loss_accurate(drawn, "none", {})
