"""LoRA on a 4-bit linear: forward + backward, base alone against ways to add the update. One GPU, about a minute.

    PYTHONPATH=$PWD python .scratch/lora_sweep.py [--seconds 60] [--kernels]

graph: CUDA-graph time (GPU alone), eager: events, cpu: host's launch time; all us for forward + backward. over: graph over the base's.
Correct first: relative Frobenius errors of y, dX, dA, dB against float32 of the decoded weight; over 1 % prints RED.
"""
import argparse, multiprocessing, os, statistics, sys, time
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__))); sys.path.insert(0, os.getcwd())
import torch
SHAPES = {"qkv": (4672, 4544), "up": (18176, 4544), "down": (4544, 18176), "dense": (4544, 4544)}
BF = torch.bfloat16
FAST = "--fast" in sys.argv

def configs():
    for p in (0.0, 0.05):
        for name in ("qkv", "up", "down"):
            for T in (512, 2048, 8192):
                yield name, T, 16, p
    for T in (512, 2048, 8192):
        for p in (0.0, 0.05):
            yield "qkv", T, 64, p
    for T in (512, 2048, 8192):
        yield "dense", T, 16, 0.0

def compile_one(config):
    try:
        import lora_k as k
        name, T, R, p = config
        N, K = SHAPES[name]
        x, dy = torch.zeros(T, K, device="cuda", dtype=BF), torch.zeros(T, N, device="cuda", dtype=BF)
        a, b, seed = torch.zeros(R, K, device="cuda"), torch.zeros(N, R, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        low, bits = k.do_project(x, a, p, seed, stages=4 if R == 16 else 2)
        k.do_project(x, a, p, seed, stages=4 if R == 16 else 2, xw=torch.empty(T, K + R, device="cuda", dtype=BF))
        k.do_outer(dy, low, up=b); k.do_outer(x, low, bits=bits if p else None, transpose=True)
        k.do_spread(low, a, 1.0, True, bits if p else None, BN=128); k.do_spread(low, b, 1.0, BN=128)
        torch.cuda.synchronize()
        return None
    except Exception as e:
        return f"{config}: {type(e).__name__}: {str(e)[:200]}"

def graph_us(fn):
    s = torch.cuda.Stream(); s.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(s):
        for _ in range(2): fn()
    torch.cuda.current_stream().wait_stream(s); torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        for _ in range(4): fn()
    g.replay(); torch.cuda.synchronize()
    return elapsed(g.replay, 7) / 4

def elapsed(fn, n):
    ev = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]
    torch.cuda.synchronize(); torch.cuda._sleep(2_000_000); ev[0].record()
    for e in ev[1:]: fn(); e.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) * 1e3 for a, b in zip(ev, ev[1:]))

def cpu_us(fn):
    out = []
    for _ in range(7):
        torch.cuda.synchronize(); t = time.perf_counter(); fn(); out.append((time.perf_counter() - t) * 1e6)
    torch.cuda.synchronize()
    return statistics.median(out)

def main():
    ap = argparse.ArgumentParser(); ap.add_argument("--seconds", type=float, default=60); ap.add_argument("--kernels", action="store_true"); ap.add_argument("--fast", action="store_true")
    args = ap.parse_args(); begin = time.time()
    from concurrent.futures import ProcessPoolExecutor, as_completed  # a compiler that aborts breaks the pool, and no more
    with ProcessPoolExecutor(12, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            for done in as_completed([pool.submit(compile_one, c) for c in configs()], timeout=120):
                if done.result(): print("compile:", done.result())
        except Exception as e: print("compile pool:", type(e).__name__, str(e)[:200])
    print(f"compiled after {time.time() - begin:.0f} s; torch {torch.__version__} {torch.cuda.get_device_name()}", flush=True)
    import qlite, lora_k as k
    from qlite import ops
    from qlite.kernels import nf4_codec, scratch
    print("qlite", qlite.__file__)
    begin = time.time()
    if args.kernels: return kernels(k)
    layers = {}
    for name, T, R, p in configs():
        if time.time() - begin > args.seconds: print("time is up"); break
        N, K = SHAPES[name]
        try: one(name, T, R, p, N, K, layers, k, qlite, ops, nf4_codec, scratch)
        except Exception as e: print(name, T, R, p, "FAILED", type(e).__name__, str(e)[:300])
        sys.stdout.flush()

def old_forward(self, x):  # what LoRALinear did before
    result = self.base(x); a, b = self.factors()
    low = torch.nn.functional.linear(self.dropout(x).to(result.dtype), a.to(result.dtype))
    return result + torch.nn.functional.linear(low, b.to(result.dtype)) * self.scaling

def one(name, T, R, p, N, K, layers, k, qlite, ops, nf4_codec, scratch):
    if name not in layers:
        layers.clear()
        base = qlite.Linear4bit(K, N, bias=False, device="cuda", dtype=BF)
        layers[name] = base.quantize_(torch.randn(N, K, device="cuda", dtype=BF) / K**0.5).requires_grad_(False)
    base = layers[name]
    layer = qlite.LoRALinear(base, qlite.LoRAConfig(r=R, alpha=2.0 * R, dropout=p)).cuda()
    torch.nn.init.normal_(layer.lora_B, std=0.05)
    s, a, b = layer.scaling, layer.lora_A.detach(), layer.lora_B.detach()
    x, dy = torch.randn(T, K, device="cuda", dtype=BF), torch.randn(T, N, device="cuda", dtype=BF)
    xg = x.clone().requires_grad_()
    coded = (base.weight, base.absmax, base.absmax_scale, base.absmax_offset, base.levels)
    decoded = lambda: ops._kernels("linear_nf4", x.device).decoded(coded, N, K, 64, BF)
    seed = torch.tensor([3], dtype=torch.int64, device="cuda")
    keep = 1 / (1 - p)
    side = torch.cuda.Stream()
    trained = [xg, layer.lora_A, layer.lora_B]

    def v_base(): y = base(xg); return y, *torch.autograd.grad(y, [xg], dy)
    def v_old(): y = old_forward(layer, xg); return y, *torch.autograd.grad(y, trained, dy)
    def v_lib(): y = layer(xg); return y, *torch.autograd.grad(y, trained, dy)
    def f32mm(l, r): return torch.mm(l, r, out_dtype=torch.float32)

    def v_manual(forked=False):  # the library's launches without autograd: what the graph does not show of the host
        ac, bs = a.to(BF), torch.mul(b, s, out=torch.empty_like(b, dtype=BF))
        low = x @ ac.T
        y = torch.mm(low, bs.T); y.addmm_(x, decoded().T)
        back = dy @ bs
        dx = torch.mm(back, ac)
        if forked:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side): db = f32mm(dy.T, low).mul_(s); da = f32mm(back.T, x)
        dx.addmm_(dy, decoded())
        if forked: torch.cuda.current_stream().wait_stream(side)
        else: da = f32mm(back.T, x); db = f32mm(dy.T, low).mul_(s)
        return y, dx, da, db
    def v_after():
        ac, bs = a.to(BF), torch.mul(b, s, out=torch.empty_like(b, dtype=BF))
        low = x @ ac.T
        y = x @ decoded().T; y.addmm_(low, bs.T)
        back = dy @ bs
        dx = dy @ decoded(); dx.addmm_(back, ac)
        return y, dx, f32mm(back.T, x), f32mm(dy.T, low).mul_(s)
    def v_triton(kernel_out=True, forked=False):
        low, bits = k.do_project(x, a, p, seed, stages=4 if R == 16 else 2)
        drop = bits if p else None
        if kernel_out: y = k.do_spread(low, b, s, BN=128)
        else: y = torch.mm(low, torch.mul(b, s, out=torch.empty_like(b, dtype=BF)).T)
        y.addmm_(x, decoded().T)
        db, back = k.do_outer(dy, low, up=b, scale=s, back_scale=s)
        dx = k.do_spread(back, a, keep, True, drop, BN=128) if kernel_out or p else torch.mm(back, a.to(BF))
        if forked:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side): da, _ = k.do_outer(x, back, bits=drop, scale=keep, transpose=True)
        dx.addmm_(dy, decoded())
        if forked: torch.cuda.current_stream().wait_stream(side)
        else: da, _ = k.do_outer(x, back, bits=drop, scale=keep, transpose=True)
        return y, dx, da, db
    def v_triton_cublas_grads():  # projection and update by Triton, the three products of the backward pass by cuBLAS
        low, _ = k.do_project(x, a, stages=4 if R == 16 else 2)
        y = k.do_spread(low, b, s, BN=128); y.addmm_(x, decoded().T)
        back = dy @ torch.mul(b, s, out=torch.empty_like(b, dtype=BF))
        dx = k.do_spread(back, a, 1.0, True, BN=128); dx.addmm_(dy, decoded())
        return y, dx, f32mm(back.T, x), f32mm(dy.T, low).mul_(s)
    wide = torch.empty(N, K + R, device="cuda", dtype=BF); tall = torch.empty(N + R, K, device="cuda", dtype=BF)
    xw, yw = torch.empty(T, K + R, device="cuda", dtype=BF), torch.empty(T, N + R, device="cuda", dtype=BF)
    def v_kaug():  # rank columns beside K in scratch: [X | U] [W | sB].T and [dY | V] [W ; A]; plain copies
        ac = a.to(BF)
        xw[:, :K].copy_(x); torch.mm(x, ac.T, out=xw[:, K:])
        nf4_codec.dequantize(*coded, K, 64, BF, out=wide[:, :K]); torch.mul(b, s, out=wide[:, K:])
        y = xw @ wide.T
        yw[:, :N].copy_(dy); torch.mm(dy, wide[:, K:], out=yw[:, N:])
        nf4_codec.dequantize(*coded, K, 64, BF, out=tall[:N]); tall[N:].copy_(a)
        dx = yw @ tall
        return y, dx, f32mm(yw[:, N:].T, x), f32mm(dy.T, xw[:, K:]).mul_(s)

    def v_mixed():  # forward: [X | U] written by the projection, rank columns in scratch; backward as "triton"
        low, bits = k.do_project(x, a, p, seed, stages=4 if R == 16 else 2, xw=xw)
        drop = bits if p else None
        nf4_codec.dequantize(*coded, K, 64, BF, out=wide[:, :K]); torch.mul(b, s, out=wide[:, K:])
        y = xw @ wide.T
        db, back = k.do_outer(dy, low, up=b, scale=s, back_scale=s)
        dx = k.do_spread(back, a, keep, True, drop, BN=128)
        dx.addmm_(dy, decoded())
        da, _ = k.do_outer(x, back, bits=drop, scale=keep, transpose=True)
        return y, dx, da, db

    variants = {"base": v_base, "before": v_old, "library": v_lib}
    if not p: variants |= {"lib launches": v_manual, "lib, forked": lambda: v_manual(True), "after": v_after, "K-augmented": v_kaug, "triton+cublas grads": v_triton_cublas_grads}
    variants |= {"triton": v_triton, "K-aug fwd, triton": v_mixed, "triton, cublas out": lambda: v_triton(False), "triton, forked": lambda: v_triton(True, True)}
    W = base.dequantize().float(); torch.backends.cuda.matmul.allow_tf32 = False
    low0, bits0 = k.do_project(x, a, p, seed, stages=4 if R == 16 else 2)
    m = k.mask_of(bits0, K).float() * keep if p else 1.0
    xf, df = x.float(), dy.float(); xd = xf * m
    want = (xf @ W.T + s * (xd @ a.T) @ b.T, df @ W + s * ((df @ b) @ a) * m, s * (df @ b).T @ xd, s * df.T @ (xd @ a.T))
    del W, xd, m
    rows, base_us = [], None
    for label, fn in variants.items():
        try:
            got = fn()
            err = max(((g.float() - w).norm() / w.norm()).item() for g, w in zip(got, want)) if label not in ("base",) and not (p and label in ("before", "library")) else float("nan")
            del got
            gus = graph_us(fn); base_us = base_us or gus
            rows.append(f"   {label:20} graph {gus:8.1f}  over {100 * (gus / base_us - 1):6.1f} %  eager {elapsed(fn, 7):8.1f}  cpu {cpu_us(fn):6.0f}  err {err:.1e}{' RED' if err > 0.01 else ''}")
        except Exception as e:
            rows.append(f"   {label:20} FAILED {type(e).__name__}: {str(e)[:160]}".replace("\n", " ")); torch.cuda.synchronize()
    print(f"{name} {N}x{K} rows {T} r {R} dropout {p}"); print("\n".join(rows))

def kernels(k):
    """Each skinny product alone, against cuBLAS and against one read of the big tensor, in tiles."""
    for name, T, R in (("qkv", 512, 16), ("qkv", 8192, 16), ("up", 2048, 16), ("up", 8192, 16), ("qkv", 8192, 64)):
        N, K = SHAPES[name]
        x, dy = torch.randn(T, K, device="cuda", dtype=BF), torch.randn(T, N, device="cuda", dtype=BF)
        a, b = torch.randn(R, K, device="cuda"), torch.randn(N, R, device="cuda"); ac, bc = a.to(BF), b.to(BF)
        seed = torch.tensor([3], dtype=torch.int64, device="cuda"); low = x @ ac.T; y = torch.empty(T, N, device="cuda", dtype=BF)
        tests = {"read x (sum)": lambda: x.view(torch.int32).sum(), "write y": lambda: y.zero_(), "copy y": lambda: y.copy_(dy),
                 "cublas U": lambda: x @ ac.T, "cublas V": lambda: dy @ bc, "cublas dB": lambda: torch.mm(dy.T, low, out_dtype=torch.float32),
                 "cublas dA": lambda: torch.mm(low.T, x, out_dtype=torch.float32), "cublas Y0": lambda: low @ bc.T, "cast b": lambda: b.to(BF)}
        for BM in (16, 32, 64, 128):
            for SPLIT in (1, 2, 4, 9):
                if 60 <= -(-T // BM) * SPLIT <= 1200: tests[f"project BM{BM} S{SPLIT}"] = lambda BM=BM, SPLIT=SPLIT: k.do_project(x, a, BM=BM, SPLIT=SPLIT, stages=4 if R == 16 else 2)
        tests["project drop"] = lambda: k.do_project(x, a, 0.05, seed, stages=4 if R == 16 else 2)
        for BC in (128, 256):
            for BM in (32, 64, 128):
                for w in (4, 8):
                    tests[f"outer+back BC{BC} BM{BM} w{w}"] = lambda BC=BC, BM=BM, w=w: k.do_outer(dy, low, up=b, BC=BC, BM=BM, warps=w, stages=3 if R == 16 else 2)
                    if BC == 128: tests[f"outer BC{BC} BM{BM} w{w}"] = lambda BC=BC, BM=BM, w=w: k.do_outer(x, low, transpose=True, BC=BC, BM=BM, warps=w, stages=3 if R == 16 else 2)
        for BM, BN in ((64, 128), (64, 256), (128, 128), (32, 256)): tests[f"spread {BM}x{BN}"] = lambda BM=BM, BN=BN: k.do_spread(low, b, 1.0, BM=BM, BN=BN)
        out = []
        for label, fn in tests.items():
            try: fn(); out.append((label, graph_us(fn)))
            except Exception as e: out.append((label, None)); print(label, type(e).__name__, str(e)[:120].replace("\n", " "))
        print(f"{name} rows {T} r {R}: " + ", ".join(f"{l} {'-' if u is None else f'{u:.1f}'}" for l, u in out), flush=True)

if __name__ == "__main__": main()
