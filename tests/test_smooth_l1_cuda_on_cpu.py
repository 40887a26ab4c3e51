"""The CUDA kernels of smooth L1 loss on the CPU: what the emulator adds to the tests that run on every backend."""
import pytest
import torch
from cuda_on_cpu import build
from harness import Backend
from smooth_l1_samples import draw, evaluate
from test_cuda_on_cpu import emulated, launches

CUDA = Backend("cuda", "cpu")
# Elements beyond those of one block.
SEVERAL_BLOCKS = (5000, 5)


@pytest.fixture(scope="module", autouse=True)
def emulator():
    build.load_emulated_cuda()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_any_order_of_threads(generator, dtype):
    for shape in (SEVERAL_BLOCKS, (431, 7)):
        inputs = draw(generator, shape, weight="row", dtype=dtype)
        results = []
        for reverse in ("0", "1"):
            with emulated(reverse=reverse):
                results.append(evaluate(CUDA, inputs))
        assert results[0] == results[1]


def test_blocks_change_the_order_of_sums_alone(generator):
    inputs = draw(generator, SEVERAL_BLOCKS, weight="element")
    results = []
    for processors in ("1", "50"):
        with emulated(processors=processors):
            results.append(evaluate(CUDA, inputs))
    torch.testing.assert_close(results[0].losses[0], results[1].losses[0], rtol=1e-7, atol=0)
    assert torch.equal(results[0].gradient, results[1].gradient)


def test_launches_depend_on_the_size_alone(generator):
    for shape, wanted in (((300, 5), 1 + 1), (SEVERAL_BLOCKS, 2 + 1), ((0, 5), 1)):
        for weight, value in (("row", 1.0), ("row", 0.0), ("element", float("nan"))):
            inputs = draw(generator, shape, weight=weight)
            inputs.weight *= value
            before = launches()
            evaluate(CUDA, inputs)
            assert launches() - before == wanted
