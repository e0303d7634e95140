"""The fused update: rows of different programs at different places, each as if alone."""

from __future__ import annotations

import pytest
import torch

from batchsd.diffusion.builtin import BUILTIN
from batchsd.diffusion.program import HISTORY, NOISES
from batchsd.diffusion.walk import along, gather, run_program, update

from .oracle import BASE, toy_network

KINDS = [
    ("ddim", 7, 0, {"eta": 0.5}),
    ("euler", 5, 2, {}),
    ("euler_a", 9, 0, {}),
    ("dpmpp_2m", 6, 0, {"sigmas": "karras"}),
    ("pndm", 6, 0, {}),
    ("dpmpp_sde", 5, 1, {}),
    ("heun", 4, 0, {}),
    ("unipc", 8, 3, {}),
]


def seeded(row, shape, dtype):
    generator = torch.Generator().manual_seed(row)
    return lambda: torch.randn(shape, generator=generator).to(dtype)


def walk_together(programs, shape, dtype, lanes):
    """A little engine: at most `lanes` rows at once, refilled as rows finish, each with its own seed."""
    waiting, finished = list(enumerate(programs)), {}
    rows, x, before, history = (
        [],
        *(torch.zeros(0, *shape, dtype=dtype),) * 2,
        torch.zeros(0, HISTORY, *shape),
    )
    history = history.to(dtype)
    while waiting or rows:
        while waiting and len(rows) < lanes:
            row, program = waiting.pop(0)
            draw = seeded(row, shape, dtype)
            rows.append([row, program, 0, draw])
            x = torch.cat([x, program.init_noise * draw()[None]])
            before = torch.cat([before, torch.zeros(1, *shape, dtype=dtype)])
            history = torch.cat([history, torch.zeros(1, HISTORY, *shape, dtype=dtype)])
        lines = gather([p for _, p, _, _ in rows], [i for _, _, i, _ in rows], dtype=dtype)
        told = along(lines.in_scale, x) * x
        out = torch.stack([toy_network(told[r], float(lines.timestep[r])) for r in range(len(rows))])
        noise = torch.zeros(len(rows), NOISES, *shape, dtype=dtype)
        for r, (_, program, i, draw) in enumerate(rows):
            for j in range(program.draws[i]):
                noise[r, j] = draw()
        x, before, history = update(lines, x, before, history, out, noise)
        for row in rows:
            row[2] += 1
        stay = [r for r, (_, program, i, _) in enumerate(rows) if i < len(program)]
        finished |= {rows[r][0]: x[r] for r in range(len(rows)) if r not in stay}
        rows, x, before, history = [rows[r] for r in stay], x[stay], before[stay], history[stay]
    return finished


@pytest.mark.parametrize("shape", [(4, 3, 5), (2, 6)])
@pytest.mark.parametrize("lanes", [1, 3, 8])
def test_mixed_rows_equal_each_row_alone(lanes, shape):
    programs = [BUILTIN[name].program(BASE, steps, begin, **o) for name, steps, begin, o in KINDS]
    together = walk_together(programs, shape, torch.float64, lanes)
    for row, program in enumerate(programs):
        draw = seeded(row, shape, torch.float64)
        alone = run_program(program, toy_network, program.init_noise * draw(), draw)
        torch.testing.assert_close(together[row], alone, rtol=1e-12, atol=1e-12)


def test_a_line_is_the_programs_row_in_float32():
    program = BUILTIN["dpmpp_2m"].program(BASE, 10)
    lines = gather([program, program], [0, 7])
    for name in lines._fields:
        want = torch.from_numpy(getattr(program, {"timestep": "timesteps"}.get(name, name))[[0, 7]]).float()
        assert torch.equal(getattr(lines, name), want), name


def test_reached_levels_are_those_of_the_next_call_and_clean_at_last():
    for name in ("heun", "dpm2", "ddim"):
        program = BUILTIN[name].program(BASE, 6)
        ratio = program.sigma / program.alpha
        assert ratio[:-1].tolist() == pytest.approx(program.call_sigma[1:].tolist())
        assert (program.alpha[-1], program.sigma[-1]) == (1, 0)


def test_image_start_is_the_level_of_its_first_call():
    for name in ("ddim", "euler", "dpmpp_2m", "pndm"):
        program = BUILTIN[name].program(BASE, 10, 4)
        assert program.init_sigma / program.init_alpha == pytest.approx(program.call_sigma[0])
        assert program.timesteps[0] == BUILTIN[name].program(BASE, 10).timesteps[4 + (name == "pndm")]


@pytest.mark.parametrize("strength", [0.3, 0.6, 0.9])
def test_pndm_image_to_image_ends_where_others_do(strength):
    """diffusers' cut list ends visibly noisy; restarted, PLMS agrees with DDIM at many steps."""
    steps = 40
    begin = steps - int(steps * strength)
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(1, 4, 6, 6, generator=generator, dtype=torch.float64) for _ in range(2))

    def final(name, steps, begin):
        program = BUILTIN[name].program(BASE, steps, begin)
        x = program.init_alpha * clean + program.init_sigma * noise
        return run_program(program, toy_network, x, None)

    exact = final("ddim", 500, 500 * begin // steps)
    ours = {name: (final(name, steps, begin) - exact).abs().max() for name in ("pndm", "ddim", "dpmpp_2m")}
    assert ours["pndm"] < max(ours["ddim"], 1.5 * ours["dpmpp_2m"]), ours
