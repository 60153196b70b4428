# ruff: noqa
"""First contact with a GPU: every kernel for Hopper once, each in a process of its own that may not take long.

python jobs/bench/hopper_smoke.py [seconds], in the repository root; then with `time`: microseconds of the rings and of prefill
"""
import subprocess, sys, time
CASES = {
 "fp8": "fp8(64, 4096, 4096, 2, 1, 1)", "fp8 x2": "fp8(64, 28672, 4096, 2, 1, 2)", "fp8 split": "fp8(9, 4096, 14336, 2, 4, 1)", "fp8 128": "fp8(128, 4096, 4096, 2, 3, 1)",
 "fp8 64 rows": "fp8(50, 4096, 4096, 1, 2, 1)", "fp8 64 rows x2": "fp8(50, 6144, 4096, 1, 2, 2)", "fp8 64 rows 128": "fp8(128, 6144, 4096, 1, 1, 1)",
 "w4 64": "w4(64, 6144, 4096, 64, 1, 1, 1)", "w4 64 x2": "w4(50, 4096, 14336, 64, 1, 4, 2)", "w4 64 groups 2": "w4(64, 4096, 14336, 64, 2, 2, 1)", "w4 64 128": "w4(128, 4096, 4096, 64, 1, 2, 1)",
 "w4 128": "w4(64, 1024, 4096, 128, 2, 1, 1)", "w4 128 x2": "w4(64, 28672, 4096, 128, 2, 1, 2)", "w4 256": "w4(64, 28672, 4096, 256, 4, 1, 1)",
 "w4 256 split 8": "w4(16, 4096, 14336, 256, 4, 8, 1)", "w4 256 groups 2": "w4(100, 1024, 4096, 256, 2, 3, 1)", "prefill bf16 128": "prefill(128, False, 0)", "prefill bf16 64": "prefill(64, False, 0)",
 "prefill window": "prefill(128, False, 150)", "prefill fp8": "prefill(128, True, 0)", "prefill fp8 64 window": "prefill(64, True, 150)",
}
PRELUDE = '''
import sys; sys.path[:0] = [".", "tests"]
import torch
from kernels import gemm_fp8_ring as R, gemm_w4_ring as W, gemm_w4, prefill_hopper as P, ref
from quantized_products import integer_layer, randn, error
like = torch.empty(0, dtype=torch.bfloat16, device="cuda"); torch.manual_seed(0)
def fp8(m, n, k, groups, splits, programs):
    x, sx = ref.fp8_quantize(randn(m, k, like=like)); w, sw = ref.fp8_quantize(randn(n, k, like=like))
    t = R.Tile(groups, splits, R.most_stages(m, groups, programs), programs)
    return lambda: R.product(x, sx, w, sw.flatten(), None, like.dtype, t), (x.double() * sx.double()) @ (w.double() * sw.double()).t()
def w4(m, n, k, outputs, groups, splits, programs):
    codes, s, z, exact = integer_layer(like, 4, n, k, 128, "whole"); x = randn(m, k, like=like); p = gemm_w4.w4_pack(codes)
    t = W.Tile(outputs, groups, splits, W.most_stages(m, outputs, programs), programs)
    return lambda: W.product(x, p, s, z, 128, None, t), x.double() @ exact.t()
def prefill(dim, f8, window):
    from attention_cases import make_case, exact, work_list
    counts, starts = [300, 1, 40, 129], [0, 500, 17, 640]
    cu = [0, *torch.tensor(counts).cumsum(0).tolist()]
    ctx = [a + b for a, b in zip(starts, counts)]
    c = make_case(ctx, cu[-1], 8, 2, dim, 32, like.dtype, "cuda", 0, [max(s + 1 - window, 0) if window else 0 for s in starts])
    c = c.as_fp8() if f8 else c
    i = lambda v: torch.tensor(v, dtype=torch.int32, device="cuda")
    a = (c.q, c.k_cache, c.v_cache, c.block_table, c.rows, i(starts), i(cu), work_list(cu).cuda(), c.scale, window, 0.0)
    want = exact(c.plain() if f8 else c, cu, starts, window, 0.0)
    return lambda: P.prefill_attention(*a, kv_scales=c.kv_scales), want.cuda()
'''
CHECK = '''
call, want = %s
torch.cuda.synchronize()
got = call(); torch.cuda.synchronize()
e = error(got, want) if got.is_cuda else 0
same = all(torch.equal(got, call()) for _ in range(200)); torch.cuda.synchronize()
print("error %%.2e" %% float((got.double() - want).norm() / want.norm()), "same bits" if same else "OTHER BITS", flush=True)
'''
TIME = '''
from jobs.bench.graph_timing import replay_seconds
from jobs.bench import quantized as q
rate = q.read_rate()
for m in (16, 64):
    for n, k in ((28672, 4096), (6144, 4096)):
        for name, layer, chosen in (("w4", q.Packed((n, k)), W.tile_of(m, n, k, 132)), ("fp8", q.Fp8((n, k)), R.tile_of(m, n, k, 132))):
            x = torch.randn(m, k, device="cuda").to(like.dtype)
            print(name, m, n, k, "%.1f us, floor %.1f" % (layer.ring(x, chosen) * 1e6, layer.bytes / rate * 1e6), tuple(chosen), flush=True)
from jobs.bench import attention as a
for model in (a.MISTRAL, a.SMOLLM):
    for f8 in (False, True):
        pool = a.Pool(model, 64 * 30 + 8 * 64, f8)
        print(model.name, f8, [round(a.hopper_prefill(model, s, pool, True)) for s in a.PREFILL_SHAPES[:3]], "TFLOP/s", flush=True)
        del pool
'''
if sys.argv[1:] == ["time"]:
    sys.exit(subprocess.run([sys.executable, "-c", PRELUDE + TIME], timeout=240).returncode)
limit = float(sys.argv[1]) if sys.argv[1:] else 40
begin = time.time()
procs = []
names = list(CASES)
while names or procs:                       # three at a time: compiling takes the longest
    while names and len(procs) < 5:
        name = names.pop(0)
        procs.append((name, time.time(), subprocess.Popen([sys.executable, "-c", PRELUDE + CHECK % CASES[name]], stdout=subprocess.PIPE,
                                                          stderr=subprocess.STDOUT, text=True)))
    for entry in list(procs):
        name, since, p = entry
        if p.poll() is None and time.time() - since < limit:
            continue
        hung = p.poll() is None
        if hung: p.kill()
        out = p.communicate()[0].strip().split("\n")
        print(f"{name:24} {'HANGS ' if hung else ''}{out[-1][:200]}  ({time.time() - since:.0f} s)", flush=True)
        procs.remove(entry)
    time.sleep(0.1)
print(f"{time.time() - begin:.0f} s")
