"""What becomes of the state of every stateful module in a training run: checkpoints, steps that fail, activation checkpointing, several
batches before a step, averaged weights, evaluation. `docs/state.md` says it in words."""
import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.utils.checkpoint
from stateful_modules import CLASSES, ROWS, STATEFUL, Batch, same_bits, state_of
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

every = pytest.mark.parametrize("one", STATEFUL.values(), ids=STATEFUL)
WITH_STATE = [one for name, one in STATEFUL.items() if name != "group_softmax"]
with_state = pytest.mark.parametrize("one", WITH_STATE, ids=[one.name for one in WITH_STATE])
# Their forwards change it.
IN_FORWARD = [one for one in WITH_STATE if one.update is None]
in_forward = pytest.mark.parametrize("one", IN_FORWARD, ids=[one.name for one in IN_FORWARD])


def draw(generator, count: int) -> list[Batch]:
    return [Batch.draw(generator) for _ in range(count)]


def trained(one, batches) -> torch.nn.Module:
    module = one.make()
    for batch in batches:
        one.step(module, batch)
    return module


def copies(module: torch.nn.Module, make) -> dict[str, torch.nn.Module]:
    """The module brought to a new life in every way: a checkpoint file, one of a model that holds it, a copy, a pickle."""
    loaded, in_model = make(), torch.nn.ModuleDict({"head": torch.nn.Linear(2, 2), "loss": make()})
    file = io.BytesIO()
    torch.save({"loss": module.state_dict(), "generator": generator_state(module)}, file)
    file.seek(0)
    checkpoint = torch.load(file, weights_only=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not any(loaded.load_state_dict(checkpoint["loss"], strict=True))
        prefixed = {f"loss.{name}": value for name, value in module.state_dict().items()}
        in_model.load_state_dict({**in_model["head"].state_dict(prefix="head."), **prefixed}, strict=True)
    for fresh in (loaded, in_model["loss"]):
        if generator_state(fresh) is not None:
            fresh.generator.set_state(checkpoint["generator"])
    return {"file": loaded, "model": in_model["loss"], "copy": copy.deepcopy(module), "pickle": pickle.loads(pickle.dumps(module))}


def generator_state(module: torch.nn.Module) -> torch.Tensor | None:
    """Of the random numbers of the sampling, which are not in the state."""
    return None if getattr(module, "generator", None) is None else module.generator.get_state()


@every
def test_resumed_training_equals_uninterrupted_training_bit_by_bit(one, generator):
    batches = draw(generator, 7)
    whole = one.make()
    results = [one.step(whole, batch) for batch in batches]
    # In the middle of windows and periods, and at their ends.
    for stop in (2, 3, 4):
        first = trained(one, batches[:stop])
        for way, resumed in copies(first, one.make).items():
            assert same_bits(state_of(resumed), state_of(first)), way
            for batch, expected in zip(batches[stop:], results[stop:], strict=True):
                assert all(map(torch.equal, one.step(resumed, batch), expected)), way
            assert same_bits(state_of(resumed), state_of(whole)), way
    assert any(not torch.equal(gradient, results[0][1]) for _, gradient in results[1:])


@with_state
def test_checkpoints_of_other_losses_and_with_narrow_buffers_load(one, generator):
    module = trained(one, draw(generator, 3))
    before = state_of(module)
    with pytest.warns(UserWarning, match="another loss") as caught:
        module.load_state_dict({"loss_weight_of_another_loss": torch.ones(3)}, strict=True)
    assert len(caught) == 1 and same_bits(state_of(module), before)
    # Buffers of the originals are float32.
    narrow = {name: value.float() if value.is_floating_point() else value for name, value in before.items()}
    fresh = one.make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict(narrow, strict=True)
    assert same_bits(state_of(fresh), {name: value.to(before[name].dtype) for name, value in narrow.items()})


@with_state
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_leaves_the_state(one, generator, value):
    batches = draw(generator, 4)
    module = trained(one, batches[:2])
    before, twin = state_of(module), copy.deepcopy(module)
    broken = batches[2].logits.clone()
    broken[0, :] = value
    quality = batches[2].quality.clone()
    quality[0] = value
    broken = Batch(broken, batches[2].labels, quality if "label_assignment" in one.name else batches[2].quality)
    loss, _ = one.step(module, broken)
    assert "label_assignment" in one.name or not loss.isfinite()
    assert same_bits(state_of(module), before)
    assert all(map(torch.equal, one.step(module, batches[3]), one.step(twin, batches[3])))
    assert not same_bits(state_of(module), before)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_seesaw_takes_counts_back_where_its_loss_is_not_finite(generator, reduction):
    """Of finite logits too: a class that is impossible, an average over nothing."""
    one, (first, second) = STATEFUL["seesaw"], draw(generator, 2)
    module = trained(one, [first])
    before = state_of(module)
    impossible = second.logits.clone()
    impossible[0, second.labels[0]] = -torch.inf
    losses = module(impossible, second.labels, reduction_override=reduction)
    assert not losses.isfinite().all() and same_bits(state_of(module), before)
    broken = torch.full((ROWS,), torch.nan)
    assert not module(second.logits, second.labels, broken, reduction_override=reduction).isfinite().any()
    assert same_bits(state_of(module), before)
    module(second.logits * 1e300, second.labels, reduction_override=reduction)
    assert module.cum_samples.sum() == 2 * ROWS


@in_forward
def test_an_overflow_that_the_scaler_finds_later_is_not_taken_back(one, generator):
    batches = draw(generator, 2)
    module = trained(one, batches[:1])
    expected = copy.deepcopy(module)
    weight = torch.nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer, scaler = torch.optim.SGD([weight], lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**17)
    loss = one(module, batches[1].with_logits(batches[1].logits * weight))
    # A layer whose gradient overflows.
    weight.register_hook(lambda gradient: gradient * torch.inf)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    assert weight.item() == 1, "the scaler took the step"
    one.step(expected, batches[1])
    assert same_bits(state_of(module), state_of(expected))


def checkpointed(one, module, batch, use_reentrant, then=lambda loss: loss) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss in a region that is computed again in backward, and the leaf of its logits."""
    leaf = batch.logits.clone().requires_grad_()
    region = torch.utils.checkpoint.checkpoint(lambda logits: then(one(module, batch.with_logits(logits))), leaf, use_reentrant=use_reentrant)
    return region, leaf


@in_forward
def test_reentrant_checkpointing_moves_the_state_once_in_backward(one, generator):
    """Its first forward has no gradients. The gradient is that of a plain forward."""
    batches = draw(generator, 2)
    module = trained(one, batches[:1])
    before, plain = state_of(module), copy.deepcopy(module)
    _, expected = one.step(plain, batches[1])
    loss, leaf = checkpointed(one, module, batches[1], True)
    assert same_bits(state_of(module), before)
    loss.backward()
    assert torch.equal(leaf.grad, expected) and same_bits(state_of(module), state_of(plain))


@in_forward
def test_checkpointing_without_reentrance_keeps_the_gradient_but_may_move_the_state_twice(one, generator):
    """Backward runs the forward again as far as it needs it: beyond the loss where something behind it keeps its value. The gradient is
    that of the first forward; only a period of balancing can end between the two."""
    batches = draw(generator, 2)
    module = trained(one, batches[:1])
    plain = copy.deepcopy(module)
    value, expected = one.step(plain, batches[1])
    once = state_of(plain)
    one.step(plain, batches[1])
    twice, other = state_of(plain), copy.deepcopy(module)
    if "running" not in one.name:
        loss, leaf = checkpointed(one, module, batches[1], False)
        assert same_bits(state_of(module), once) and torch.equal(loss, value)
        loss.backward()
        assert torch.equal(leaf.grad, expected)
        assert same_bits(state_of(module), once)
    keeps = torch.ones((), dtype=torch.float64, requires_grad=True)
    checkpointed(one, other, batches[1], False, lambda loss: loss * keeps)[0].backward()
    assert same_bits(state_of(other), twice)


@every
def test_micro_batches_are_steps_of_the_state_and_gradients_add(one, generator):
    batches = draw(generator, 4)
    module, apart = one.make(), one.make()
    expected = [one.step(apart, batch)[1] for batch in batches]
    weight = torch.zeros(ROWS, CLASSES + 2, dtype=torch.float64, requires_grad=True)
    total = sum(one(module, batch.with_logits(batch.logits + weight)) for batch in batches[:2])
    total.backward()
    for batch in batches[2:]:
        one(module, batch.with_logits(batch.logits + weight)).backward()
    assert same_bits(state_of(module), state_of(apart))
    torch.testing.assert_close(weight.grad, sum(expected), rtol=1e-13, atol=1e-15)


@every
@pytest.mark.parametrize("how", ["eval", "no_grad", "inference_mode"])
def test_validation_leaves_the_state(one, generator, how):
    """A validation loss in training mode without gradients too; what has an `update` changes in that alone, in training mode."""
    batches = draw(generator, 3)
    module = trained(one, batches[:2])
    before, state_of_generator = state_of(module), generator_state(module)
    module.train(how != "eval")
    with {"eval": torch.enable_grad, "no_grad": torch.no_grad, "inference_mode": torch.inference_mode}[how]():
        assert one.loss(module, batches[2]).isfinite()
        assert same_bits(state_of(module), before)
        if one.update is not None:
            one.update(module, batches[2])
    assert same_bits(state_of(module), before) == (how == "eval" or one.update is None)
    # Training goes on from there: no buffer was left behind by inference.
    if state_of_generator is not None:
        module.generator.set_state(state_of_generator)
    one.step(module.train(), batches[2])


class Model(torch.nn.Module):
    """A model that holds its losses, as a detector's head does."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(CLASSES + 2, CLASSES + 2, dtype=torch.float64)
        self.losses = torch.nn.ModuleDict({name.replace(" ", "_"): one.make() for name, one in STATEFUL.items()})

    def train_step(self, batch: Batch) -> None:
        batch = batch.with_logits(self.linear(batch.logits))
        total = sum(one(self.losses[name.replace(" ", "_")], batch) for name, one in STATEFUL.items())
        total.backward()
        with torch.no_grad():
            for parameter in self.linear.parameters():
                parameter -= 1e-3 * parameter.grad
                parameter.grad = None


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_averaged_weights(use_buffers, decay, generator):
    """The averaged model of a model that holds its losses: with its default it has the newest state. With `use_buffers` the state is
    averaged as weights are, and counters lose what is behind the point."""
    torch.manual_seed(0)
    model = Model()
    options = {} if decay is None else {"multi_avg_fn": get_ema_multi_avg_fn(decay)}
    averaged = AveragedModel(model, use_buffers=use_buffers, **options)
    alone = copy.deepcopy(model)
    for batch in draw(generator, 3):
        model.train_step(batch)
        averaged.update_parameters(model)
        alone.train_step(batch)
    assert same_bits(state_of(model), state_of(alone)), "averaging changed the training"
    assert not torch.equal(averaged.module.linear.weight, model.linear.weight)
    newest, kept = state_of(model.losses), state_of(averaged.module.losses)
    assert same_bits(newest, kept) != use_buffers
    for name, value in kept.items():
        assert value.dtype == newest[name].dtype and (not value.is_floating_point() or value.isfinite().all()), name
        if ".groups." in name:
            assert torch.equal(value, newest[name]), f"{name} was averaged"
    # It evaluates.
    averaged.eval()
    before = state_of(averaged)
    for name, one in STATEFUL.items():
        assert one(averaged.module.losses[name.replace(" ", "_")], Batch.draw(generator)).isfinite(), name
    assert same_bits(state_of(averaged), before)
