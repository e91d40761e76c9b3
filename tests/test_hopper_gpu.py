"""The Hopper backend on a Hopper GPU: accuracy beside float64, every mask and shape, and repeatability.

Each group of cases runs in a process of its own with a time limit: a kernel that never ends must not take the rest
with it. Run by hand, `python tests/test_hopper_gpu.py GROUP` prints one line a case; ``python tests/test_hopper_gpu.py
fuzz 1000 7`` draws 1,000 random cases from seed 7.
"""

import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from hopper_cases import MASKS, Case, error, fuzz, run, shapes, tensors
from reference import attention_reference
from torch import Tensor

from ringspan.kernels import hopper_backend
from ringspan.kernels.attention import attention_delta
from ringspan.kernels.plan import plan
from ringspan.kernels.spans import Spans


def require_same_bits(found: dict[str, Tensor], first: dict[str, Tensor], where: str) -> None:
    for name, x in found.items():
        assert torch.equal(x, first[name]), f"{where}: {name} differs from the first run's"


def repeat(times: int) -> None:
    """The forward pass and the deterministic backward give the same bits again and again, whatever runs first."""
    for head_dim in (128, 64):
        case = Case(head_dim=head_dim, queries=2000, keys=2000, heads=8, kv_heads=2, batch=2, mask="packed")
        generator = torch.Generator().manual_seed(5)
        q, k, v, dout = tensors(case, generator)
        mask = plan(MASKS["packed"](case, generator).to("cuda"), case.keys)
        first: dict[str, Tensor] = {}
        for i in range(times):
            out, lse = hopper_backend.forward(q, k, v, mask, scale=0.1, softcap=0.0, into=None, out_dtype=q.dtype)
            delta = torch.zeros_like(lse)
            dq = torch.zeros(q.shape, device=q.device)  # given, so that its bits are compared in fp32
            _, dk, dv = hopper_backend.backward(
                dout, q, k, v, lse, delta, mask,
                scale=0.1, softcap=0.0, dq=dq, dk=None, dv=None, deterministic=True,
            )  # fmt: skip
            found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
            first = first or found
            require_same_bits(found, first, f"head dim {head_dim}, run {i}")
        print(f"ok     {times} runs of head dim {head_dim} agree to the bit")


def long(head_dim: int) -> None:
    """A million tokens, 2.4 billion elements of q: the last rows of the last kv head and of its query heads.

    In a window of 1,000 they depend on the last 3,000 tokens alone, which the reference takes.
    """
    length, heads, kv_heads, window, tail = 2**20, 18 * 128 // head_dim, 2, 1000, 3000
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, length, n, head_dim, dtype=torch.bfloat16, device="cuda", generator=generator)
        for n in (heads, kv_heads, kv_heads, heads)
    )
    assert q.numel() > 2**31
    mask, scale = plan(Spans.causal(length, window=window).to("cuda"), length), head_dim**-0.5
    out, lse = hopper_backend.forward(q, k, v, mask, scale=scale, softcap=0.0, into=None, out_dtype=q.dtype)
    delta = attention_delta(dout, out)
    dq, dk, dv = hopper_backend.backward(
        dout, q, k, v, lse, delta, mask, scale=scale, softcap=0.0, dq=None, dk=None, dv=None
    )
    group = slice(heads - heads // kv_heads, heads)
    leaves = [
        x[:, -tail:, h].double().requires_grad_() for x, h in ((q, group), (k, slice(1, None)), (v, slice(1, None)))
    ]
    spans = Spans.causal(tail, window=window).to("cuda")
    want, want_lse = attention_reference(*leaves, spans.lo, spans.hi, scale)
    whole = slice(-window, None)  # these see, and are seen by, the last 3,000 only
    errors = {"lse": (lse[:, group, whole] - want_lse[:, :, whole]).abs().max().item() / 1e-4}
    want_dq, want_dk, want_dv = torch.autograd.grad(want, leaves, dout[:, -tail:, group].double())
    eps = torch.finfo(q.dtype).eps
    for name, got, truth in (
        ("out", out[:, :, group], want.detach()), ("dq", dq[:, :, group], want_dq),
        ("dk", dk[:, :, 1:], want_dk), ("dv", dv[:, :, 1:], want_dv),
    ):  # fmt: skip
        errors[name] = error(got[:, whole], truth[:, whole], eps)
    line = " ".join(f"{name} {value:.2f}" for name, value in errors.items())
    assert max(errors.values()) <= 1.5, line
    print(f"ok     {length} tokens of head dim {head_dim}: {line}")


def alone(head_dim: int, seconds: float) -> None:
    """Kernels of 50 to 200 ms again and again: out, lse, dk and dv are the same bits each time."""
    case = Case(head_dim=head_dim, queries=65536, keys=65536, heads=2048 // head_dim, kv_heads=512 // head_dim)
    generator = torch.Generator().manual_seed(5)
    q, k, v, dout = tensors(case, generator)
    mask = plan(MASKS["causal"](case, generator).to("cuda"), case.keys)
    first: dict[str, Tensor] = {}
    end, runs = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        out, lse = hopper_backend.forward(q, k, v, mask, scale=0.1, softcap=0.0, into=None, out_dtype=q.dtype)
        _, dk, dv = hopper_backend.backward(
            dout, q, k, v, lse, torch.zeros_like(lse), mask, scale=0.1, softcap=0.0, dq=None, dk=None, dv=None
        )
        torch.cuda.synchronize()
        found = {"out": out, "lse": lse, "dk": dk, "dv": dv}
        first = first or found
        require_same_bits(found, first, f"head dim {head_dim}, run {runs}")
        runs += 1
    print(f"ok     {runs} runs of head dim {head_dim}")


def shared(processes: int, seconds: float) -> int:
    """So many processes that do this `alone` on one GPU: in turn for milliseconds each, so amid a kernel."""
    commands = [[sys.executable, __file__, "alone", str((128, 64)[i % 2]), str(seconds)] for i in range(processes)]
    with ExitStack() as stack:
        running = [stack.enter_context(subprocess.Popen(command)) for command in commands]
    return sum(one.returncode != 0 for one in running)


def main(group: str, *arguments: str) -> int:
    """Runs a group, prints a line a case (errors in units of what rounding explains); the number of failures."""
    if group == "repeat":
        repeat(int(arguments[0]) if arguments else 100)
        return 0
    if group == "long":
        long(*map(int, arguments))
        return 0
    if group == "alone":
        alone(int(arguments[0]), float(arguments[1]))
        return 0
    if group == "shared":
        return shared(int(arguments[0]), float(arguments[1]))
    head_dim = int(group.rsplit("-", 1)[-1]) if "-" in group else 0
    if group.startswith("smoke"):
        forward_only = "forward" in group
        cases = [Case(head_dim=head_dim, mask=m, forward_only=forward_only) for m in ("full", "causal", "none")]
    else:
        cases = shapes(head_dim) if group.startswith("shapes") else fuzz(*map(int, arguments or ("60", "0")))
    failures = 0
    for case in cases:
        try:
            errors = run(case)
            good = max(errors.values()) <= 1.5
            line = " ".join(f"{name} {value:.2f}" for name, value in errors.items())
        except AssertionError as reason:
            good, line = False, str(reason)
        failures += not good
        print("ok    " if good else "FAILED", line, case, flush=True)
    print(f"{len(cases) - failures} of {len(cases)} cases of {group} are within their bounds")
    return failures


_passed: dict[str, bool] = {}


def in_process(seconds: int, *arguments: str) -> None:
    done = None
    try:
        done = subprocess.run(
            [sys.executable, __file__, *arguments], capture_output=True, text=True, timeout=seconds, check=False
        )
        text, end = done.stdout + done.stderr, f"exit status {done.returncode}"
    except subprocess.TimeoutExpired as late:
        text, end = str((late.stdout or b"").decode()), f"no end after {seconds} s: a kernel hangs"
    _passed[arguments[0]] = done is not None and done.returncode == 0
    if not _passed[arguments[0]]:
        lines = text.splitlines()
        bad = [line for line in lines if line.startswith("FAILED")]
        pytest.fail("\n".join([f"{arguments}: {end}", *bad[:20], "--- the last lines:", *lines[-15:]]), pytrace=False)


def needs(*groups: str) -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"compute capability {torch.cuda.get_device_capability()} is not (9, 0)")
    bad = [group for group in groups if _passed.get(group) is False]
    if bad:
        pytest.skip(f"{', '.join(bad)} failed")


# In order of risk: what hangs or is wrong in a smoke test is not asked again.
@pytest.mark.gpu
@pytest.mark.parametrize("group", ["smoke-forward-128", "smoke-forward-64", "smoke-128", "smoke-64"])
def test_smoke(group):
    needs(*([] if "forward" in group else [group.replace("smoke", "smoke-forward")]))
    in_process(120, group)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [128, 64])
def test_tile_edges_masks_groups_views_and_merging(head_dim):
    needs(f"smoke-{head_dim}", f"smoke-forward-{head_dim}")
    in_process(240, f"shapes-{head_dim}")


@pytest.mark.gpu
def test_random_cases():
    needs("smoke-128", "smoke-64", "smoke-forward-128", "smoke-forward-64")
    in_process(240, "fuzz", "60", "0")


@pytest.mark.gpu
def test_same_bits_again():
    needs("smoke-128", "smoke-64", "smoke-forward-128", "smoke-forward-64")
    in_process(120, "repeat", "100")


@pytest.mark.gpu
def test_a_gpu_that_processes_share():
    needs("smoke-128", "smoke-64", "smoke-forward-128", "smoke-forward-64")
    in_process(120, "shared", "4", "20")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [128, 64])
def test_a_million_tokens(head_dim):
    needs(f"smoke-{head_dim}", f"smoke-forward-{head_dim}")
    in_process(120, "long", str(head_dim))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(min(main(*sys.argv[1:]), 99))
