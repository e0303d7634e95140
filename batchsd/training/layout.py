"""Do pictures keep the layout they were given? `python -m batchsd.training.layout TEXT_MODEL DEPTH_MODEL JUDGE`.

On held-out scenes: the overlap (IoU) of the drawn bodies with the scene's true mask, and how often the asked colours
show. Depth rows get the scene's depth map; image rows its picture and a caption with one body's colour changed.
Every picture, the true render and its pass through the autoencoder too, is cut out by the same rule, `foreground`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchsd.images import grey16, png
from batchsd.model.checkpoint import Model, load
from batchsd.tasks.depth import DepthTask
from batchsd.tasks.image import ImageTask
from batchsd.tasks.text import TextTask
from batchsd.training.captions import Parts, asked, held_out_captions, say
from batchsd.training.evaluate import draw, round_trip
from batchsd.training.judge import Images, Judge, score
from batchsd.training.render import SHADOW, Rendered, camera_rays
from batchsd.training.scenes import COLOURS, Scene, render
from batchsd.types import BatchsdError, Task

Masks = NDArray[np.bool_]

# Levels of 255 between a pixel and the empty scene. Of 15, 20, ... 50 the one that cuts true renders best: IoU 0.96.
_DIFFERS = 30
_SHAPES_ALONE = Parts(sizes=(False, False), place=False)


def foreground(images: Images, scenes: Sequence[Scene]) -> Masks:
    """What is no floor and no wall: pixels unlike the scene without its bodies, lit or in shadow. N H W bool.

    Floor and wall are those of the scene, which its caption names; bodies, depth and masks are not looked at.
    """
    found = [_differs(image, render(replace(s, bodies=())).image) for image, s in zip(images, scenes, strict=True)]
    return np.stack(found)


def _differs(image_HW3: NDArray[np.uint8], empty_HW3: NDArray[np.uint8]) -> Masks:
    pixels, empty = image_HW3.astype(np.float32), empty_HW3.astype(np.float32)
    on_floor = camera_rays(len(image_HW3)).is_floor
    # A shadow darkens the floor by some share of SHADOW: the nearest such tone.
    lit = (pixels * empty).sum(-1) / (empty * empty).sum(-1)
    tone = np.where(on_floor, lit.clip(SHADOW, 1), 1)
    return np.linalg.norm(pixels - tone[..., None] * empty, axis=-1) > _DIFFERS


def overlap(found: Masks, true: Masks) -> float:
    """Mean over the pictures of intersection over union."""
    both, either = (found & true).sum((1, 2)), (found | true).sum((1, 2))
    return float(np.mean(both / np.maximum(either, 1)))


@dataclass(frozen=True)
class Layouts:
    """Scenes with their renders: what there is to keep."""

    scenes: Sequence[Scene]
    drawn: Sequence[Rendered]

    @classmethod
    def held_out(cls, n: int) -> Layouts:
        scenes = [scene for _, scene in held_out_captions(n)]
        return cls(scenes, [render(scene) for scene in scenes])

    @property
    def images(self) -> Images:
        return np.stack([each.image for each in self.drawn])

    def overlap(self, images: Images) -> float:
        return overlap(foreground(images, self.scenes), np.stack([each.masks > 0 for each in self.drawn]))

    def depth_inputs(self) -> list[dict[str, Any]]:
        """The scenes' maps as a manifest would hold them: 16-bit PNG, near is white."""
        return [{"depth": grey16(1 / each.depth)} for each in self.drawn]

    def image_inputs(self, strength: float) -> list[dict[str, Any]]:
        return [{"init_image": png(each.image), "strength": strength} for each in self.drawn]

    def recoloured(self) -> list[Scene]:
        """Each scene with its first body in the next colour but two: one that it did not have."""

        def other(scene: Scene) -> Scene:
            first, *rest = scene.bodies
            colour = COLOURS[(COLOURS.index(first.colour) + 3) % len(COLOURS)]
            return replace(scene, bodies=(replace(first, colour=colour), *rest))

        return [other(scene) for scene in self.scenes]


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn and read: sampler, steps, guidance, and the judge of colours."""

    judge: Judge
    scheduler: str
    steps: int
    guidance: float

    def line(
        self,
        model: Model,
        layouts: Layouts,
        task: Task,
        inputs: Sequence[Mapping[str, Any]] | None,
        scenes: Sequence[Scene] | None = None,
        parts: Parts = Parts(),  # noqa: B008 (frozen)
    ) -> tuple[float, float]:
        """(IoU with the layouts, share of pictures whose asked colours all show); `scenes` are what is asked."""
        scenes = layouts.scenes if scenes is None else scenes
        captions = [say(scene, parts) for scene in scenes]
        images = draw(model, captions, self.scheduler, self.steps, self.guidance, task, inputs)
        rates = score(self.judge.read(images), [asked(scene, parts) for scene in scenes])
        return layouts.overlap(images), rates["colour"]


def depth_table(how: Drawing, text: Model, depth: Model, layouts: Layouts) -> dict[str, tuple[float, float]]:
    """Depth rows, and the same captions without: full ones, and such that name colours and shapes alone."""
    maps, unsaid = layouts.depth_inputs(), _SHAPES_ALONE
    others = maps[1:] + maps[:1]
    return {
        "depth, full captions": how.line(depth, layouts, DepthTask(), maps),
        "text alone, full captions": how.line(text, layouts, TextTask(), None),
        "depth, no size or place said": how.line(depth, layouts, DepthTask(), maps, parts=unsaid),
        "text alone, no size or place said": how.line(text, layouts, TextTask(), None, parts=unsaid),
        "another scene's depth": how.line(depth, layouts, DepthTask(), others, parts=unsaid),
    }


def image_table(how: Drawing, text: Model, layouts: Layouts) -> dict[str, tuple[float, float]]:
    """Image rows that ask for another colour, at several strengths."""
    scenes = layouts.recoloured()
    return {
        f"image, another colour, strength {strength}": how.line(
            text, layouts, ImageTask(), layouts.image_inputs(strength), scenes
        )
        for strength in (0.3, 0.5, 0.7, 1.0)
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m batchsd.training.layout", description=__doc__)
    parser.add_argument("text", type=Path, help="the text model")
    parser.add_argument("depth", type=Path, help="the depth model")
    parser.add_argument("judge", type=Path, help="made by python -m batchsd.training.judge train")
    parser.add_argument("--count", type=int, default=256)
    parser.add_argument("--scheduler", default="dpmpp_2m")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=3.0)
    given = parser.parse_args(arguments)
    try:
        text, depth, judge = load(given.text), load(given.depth), Judge.load(given.judge)
    except BatchsdError as error:
        print(f"batchsd: {error}", file=sys.stderr)
        return error.exit_code
    layouts = Layouts.held_out(given.count)
    back = round_trip(text, layouts.images)
    colours = [score(judge.read(each), [asked(s) for s in layouts.scenes])["colour"] for each in (layouts.images, back)]
    ceiling = layouts.overlap(back)
    found = {"true render": (layouts.overlap(layouts.images), colours[0]), "autoencoder": (ceiling, colours[1])}
    print(f"{'':36}{'IoU':>8}{'of the autoencoder':>20}{'colours':>10}")
    how = Drawing(judge, given.scheduler, given.steps, given.guidance)

    def show(part: Mapping[str, tuple[float, float]]) -> None:
        for name, (iou, colour) in part.items():
            print(f"{name:36}{iou:8.3f}{iou / ceiling:20.3f}{colour * 100:10.1f}", flush=True)

    show(found)
    show(depth_table(how, text, depth, layouts))
    show(image_table(how, text, layouts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
