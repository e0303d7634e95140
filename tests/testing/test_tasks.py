"""The task's contract: ours keeps it, and each broken promise is found."""

from dataclasses import dataclass, replace

import pytest
import torch

from batchsd.tasks.text import TextTask
from batchsd.testing import TinyModel, check_task, example_request
from batchsd.types import Blend, RowError

TEXT = TextTask()


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("size", [(64, 96), (None, None)])
def test_text_keeps_the_contract(guidance, size):
    check_task(TEXT, example_request(guidance_scale=guidance, height=size[0], width=size[1]))


@dataclass
class Picture:
    """A good task with every kind of tensor: it starts from a picture and keeps its left half."""

    columns: tuple = ("init_image",)

    def __call__(self, request, model, generator):
        image = request.inputs["init_image"]
        if not isinstance(image, torch.Tensor):
            raise RowError("bad_image", "init_image is no picture")
        plain = TEXT(request, replace(model, extra_channels=0), generator)
        if image.shape[1:] != (request.height, request.width):
            raise RowError("bad_image", "init_image has another size")
        clean = model.encode_image(image, generator)
        mask = torch.ones(1, *clean.shape[1:])
        mask[:, :, : mask.shape[2] // 2] = 0
        branches = tuple(replace(branch, channels_CHW=mask) for branch in plain.branches)
        blend = Blend(mask, clean, plain.noise_CHW)
        return replace(plain, branches=branches, clean_CHW=clean, begin=8, blend=blend)


PICTURE = example_request(inputs={"init_image": torch.rand(3, 64, 96) * 2 - 1})
MASKED = TinyModel(extra_channels=1)


def test_a_task_with_every_tensor_passes():
    check_task(Picture(), PICTURE, MASKED)


def after(change):
    """The good task with one thing of its answer changed."""

    class Changed(Picture):
        def __call__(self, request, model, generator):
            return change(super().__call__(request, model, generator), request)

    return Changed()


def global_draw(found, request):
    torch.rand(1)
    return found


def half_mask(found, request):
    return replace(found, blend=replace(found.blend, mask_1HW=found.blend.mask_1HW * 0.5))


def numbered(found, request, calls=[]):  # noqa: B006
    calls.append(1)
    return replace(found, clean_CHW=found.clean_CHW + len(calls))


def nan(found, request):
    return replace(found, clean_CHW=found.clean_CHW * float("nan"))


BROKEN = {
    "global draw": (global_draw, "drew from torch's global generator"),
    "no seed": (
        lambda f, r: replace(f, noise_CHW=torch.ones(4, 8, 12)),
        "another seed gives the same noise_CHW",
    ),
    "whims": (numbered, "clean_CHW differs between two calls with one seed"),
    "noise shape": (
        lambda f, r: replace(f, noise_CHW=f.noise_CHW[None]),
        "noise_CHW has shape (1, 4, 8, 12)",
    ),
    "clean shape": (lambda f, r: replace(f, clean_CHW=f.clean_CHW[:3]), "clean_CHW has shape (3, 8, 12)"),
    "half floats": (lambda f, r: replace(f, noise_CHW=f.noise_CHW.half()), "noise_CHW is not float32"),
    "nan": (nan, "clean_CHW holds NaN"),
    "no branch": (lambda f, r: replace(f, branches=()), "no branches"),
    "weights count": (lambda f, r: replace(f, weights=lambda s: (1.0,)), "gives 1 numbers"),
    "weights sum": (lambda f, r: replace(f, weights=lambda s: (1.0, 1.0)), "sum to 2.0, not 1"),
    "begin late": (lambda f, r: replace(f, begin=21), "begin is 21 of 20 steps"),
    "begin from nothing": (lambda f, r: replace(f, clean_CHW=None), "begin without clean_CHW"),
    "soft mask": (half_mask, "blend.mask_1HW is not 0 or 1"),
    "no answer": (lambda f, r: None, "returned NoneType, not a Conditioning"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_task_is_found(case):
    change, words = BROKEN[case]
    with pytest.raises(AssertionError) as error:
        check_task(after(change), PICTURE, MASKED)
    assert words in str(error.value)


def test_extra_channels_must_be_filled():
    with pytest.raises(AssertionError, match="given, but the checkpoint has 0 extra"):
        check_task(Picture(), PICTURE, TinyModel())
    with pytest.raises(AssertionError, match=r"channels_CHW has shape \(1, 8, 12\), not \(5, 8, 12\)"):
        check_task(Picture(), PICTURE, TinyModel(extra_channels=5))


def test_another_error_than_row_error_is_found():
    @dataclass
    class Careless(Picture):
        def __call__(self, request, model, generator):
            if request.inputs["init_image"] is None:
                raise KeyError("init_image")
            return super().__call__(request, model, generator)

    with pytest.raises(AssertionError, match="a row with odd inputs raised KeyError"):
        check_task(Careless(), PICTURE, MASKED)


def test_columns_are_declared():
    with pytest.raises(AssertionError, match=r"\['init_image'\], which the task does not declare"):
        check_task(Picture(columns=()), PICTURE, MASKED)
    with pytest.raises(AssertionError, match="give a tuple of column names"):
        check_task(Picture(columns="init_image"), PICTURE, MASKED)
    with pytest.raises(AssertionError, match="is not a task"):
        check_task(print, PICTURE)
