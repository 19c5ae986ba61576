"""Prototype Triton kernels for LoRA's skinny products (dropout in bits, one read of each big tensor)."""
import triton, triton.language as tl, torch
from torch import Tensor

@triton.jit
def project(x, a, parts, low, bits, seed, counters, xw, T, K, BYTES, threshold, keep,
            R: tl.constexpr, BM: tl.constexpr, SPLIT: tl.constexpr, DROP: tl.constexpr, COPY: tl.constexpr):
    # low[T, R] = drop(x)[T, K] @ a[R, K].T; K in blocks of 128 = 4 x 32; SPLIT programs share a row block, the last one sums.
    pm, ps = tl.program_id(0), tl.program_id(1)
    rows = (pm * BM + tl.arange(0, BM)).to(tl.int64)
    ok = rows < T
    r = tl.arange(0, R)
    blocks = tl.cdiv(K, 128)
    each = tl.cdiv(blocks, SPLIT)
    acc = tl.zeros((BM, R), tl.float32)
    if DROP:
        c = tl.arange(0, 32)
        s = tl.load(seed)
        for kb in range(ps * each, tl.minimum((ps + 1) * each, blocks)):
            at = rows[:, None] * BYTES + (kb * 32 + c)[None, :]
            r0, r1, r2, r3 = tl.randint4x(s, at.to(tl.uint32))
            m0 = r0.to(tl.uint32, bitcast=True) >= threshold
            m1 = r1.to(tl.uint32, bitcast=True) >= threshold
            m2 = r2.to(tl.uint32, bitcast=True) >= threshold
            m3 = r3.to(tl.uint32, bitcast=True) >= threshold
            tl.store(bits + at, (m0.to(tl.uint8) + m1.to(tl.uint8) * 2 + m2.to(tl.uint8) * 4 + m3.to(tl.uint8) * 8), mask=ok[:, None])
            for j in tl.static_range(4):
                k = kb * 128 + j * 32 + c
                m = m0 if j == 0 else (m1 if j == 1 else (m2 if j == 2 else m3))
                if COPY:
                    whole = tl.load(x + rows[:, None] * K + k[None, :], mask=ok[:, None] & (k < K)[None, :], other=0.0)
                    tl.store(xw + rows[:, None] * (K + R) + k[None, :], whole, mask=ok[:, None] & (k < K)[None, :])
                xt = tl.load(x + rows[:, None] * K + k[None, :], mask=ok[:, None] & (k < K)[None, :] & m, other=0.0)
                at_ = tl.load(a + r[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0).to(xt.dtype)
                acc = tl.dot(xt, at_.T, acc)
        acc = acc * keep
    else:
        c = tl.arange(0, 128)
        for kb in range(ps * each, tl.minimum((ps + 1) * each, blocks)):
            k = kb * 128 + c
            xt = tl.load(x + rows[:, None] * K + k[None, :], mask=ok[:, None] & (k < K)[None, :], other=0.0)
            if COPY:
                tl.store(xw + rows[:, None] * (K + R) + k[None, :], xt, mask=ok[:, None] & (k < K)[None, :])
            at_ = tl.load(a + r[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0).to(xt.dtype)
            acc = tl.dot(xt, at_.T, acc)
    out = rows[:, None] * R + r[None, :]
    if SPLIT == 1:
        tl.store(low + out, acc.to(low.dtype.element_ty), mask=ok[:, None])
        if COPY:
            tl.store(xw + rows[:, None] * (K + R) + (K + r)[None, :], acc.to(low.dtype.element_ty), mask=ok[:, None])
    else:
        tl.store(parts + ps.to(tl.int64) * T * R + out, acc, mask=ok[:, None])
        tl.debug_barrier()
        before = tl.atomic_add(counters + pm, 1, sem="acq_rel")
        if before == SPLIT - 1:
            total = tl.zeros((BM, R), tl.float32)
            pointers = parts + out
            for i in range(SPLIT):
                total += tl.load(pointers, mask=ok[:, None], other=0.0, cache_modifier=".cg")
                pointers += T * R
            tl.store(low + out, total.to(low.dtype.element_ty), mask=ok[:, None])
            if COPY:
                tl.store(xw + rows[:, None] * (K + R) + (K + r)[None, :], total.to(low.dtype.element_ty), mask=ok[:, None])
            tl.store(counters + pm, 0)

@triton.jit
def outer(z, small, up, parts, back, bits, T, C, BYTES, T_EACH,
          R: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr, BACK: tl.constexpr, DROP: tl.constexpr):
    # parts[pt, C, R] = (mask * z)[T, C].T @ small[T, R] over a range of rows; BACK: also back[pc, T, R] = z[:, chunk] @ up[chunk, R].
    pc, pt = tl.program_id(0), tl.program_id(1)
    cols = pc * BC + tl.arange(0, BC)
    r = tl.arange(0, R)
    okc = cols < C
    acc = tl.zeros((BC, R), tl.float32)
    if BACK:
        u = tl.load(up + cols[:, None].to(tl.int64) * R + r[None, :], mask=okc[:, None], other=0.0).to(z.dtype.element_ty)
    for t0 in range(pt * T_EACH, tl.minimum((pt + 1) * T_EACH, T), BM):
        rows = (t0 + tl.arange(0, BM)).to(tl.int64)
        ok = rows < T
        m = ok[:, None] & okc[None, :]
        if DROP:
            byte = tl.load(bits + rows[:, None] * BYTES + (cols // 128 * 32 + cols % 32)[None, :], mask=m, other=0)
            m = m & (((byte >> (cols % 128 // 32)[None, :].to(tl.uint8)) & 1) != 0)
        zt = tl.load(z + rows[:, None] * C + cols[None, :], mask=m, other=0.0)
        st = tl.load(small + rows[:, None] * R + r[None, :], mask=ok[:, None], other=0.0)
        acc = tl.dot(zt.T, st, acc)
        if BACK:
            part = tl.dot(zt, u)
            tl.store(back + (pc.to(tl.int64) * T + rows)[:, None] * R + r[None, :], part, mask=ok[:, None])
    tl.store(parts + (pt.to(tl.int64) * C + cols)[:, None] * R + r[None, :], acc, mask=okc[:, None])

@triton.jit
def finish(parts, out, back, low, C, T, n_parts, n_back, scale, back_scale, blocks_out,
           R: tl.constexpr, B: tl.constexpr, TRANSPOSE: tl.constexpr, BACK: tl.constexpr):
    # out = scale * sum(parts) as (C, R), or (R, C) if TRANSPOSE; back: low[T, R] = back_scale * sum(back).
    pid = tl.program_id(0)
    r = tl.arange(0, R)
    if pid < blocks_out:
        rows = pid * B + tl.arange(0, B)
        ok = (rows < C)[:, None]
        acc = tl.zeros((B, R), tl.float32)
        pointers = parts + rows[:, None] * R + r[None, :]
        for i in range(n_parts):
            acc += tl.load(pointers, mask=ok, other=0.0)
            pointers += C * R
        at = r[None, :] * C + rows[:, None] if TRANSPOSE else rows[:, None] * R + r[None, :]
        tl.store(out + at, acc * scale, mask=ok)
    elif BACK:
        rows = (pid - blocks_out) * B + tl.arange(0, B)
        ok = (rows < T)[:, None]
        acc = tl.zeros((B, R), tl.float32)
        pointers = back + rows[:, None] * R + r[None, :]
        for i in range(n_back):
            acc += tl.load(pointers, mask=ok, other=0.0)
            pointers += T * R
        tl.store(low + rows[:, None] * R + r[None, :], (acc * back_scale).to(low.dtype.element_ty), mask=ok)

@triton.jit
def spread(low, b, bits, out, T, N, BYTES, scale,
           R: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ROWS_R: tl.constexpr, DROP: tl.constexpr):
    # out[T, N] = scale * mask * (low[T, R] @ b), b (N, R), or (R, N) if ROWS_R; written once, b in float32.
    pn, pm = tl.program_id(0), tl.program_id(1)
    rows = (pm * BM + tl.arange(0, BM)).to(tl.int64)
    cols = pn * BN + tl.arange(0, BN)
    r = tl.arange(0, R)
    m = (rows < T)[:, None] & (cols < N)[None, :]
    lt = tl.load(low + rows[:, None] * R + r[None, :], mask=(rows < T)[:, None], other=0.0)
    if ROWS_R:
        bt = tl.load(b + r[:, None] * N + cols[None, :], mask=(cols < N)[None, :], other=0.0).to(lt.dtype)
    else:
        bt = tl.load(b + cols[:, None].to(tl.int64) * R + r[None, :], mask=(cols < N)[:, None], other=0.0).to(lt.dtype).T
    acc = tl.dot(lt, bt) * scale
    if DROP:
        byte = tl.load(bits + rows[:, None] * BYTES + (cols // 128 * 32 + cols % 32)[None, :], mask=m, other=0)
        acc = tl.where(((byte >> (cols % 128 // 32)[None, :].to(tl.uint8)) & 1) != 0, acc, 0.0)
    tl.store(out + rows[:, None] * N + cols[None, :], acc.to(out.dtype.element_ty), mask=m)

_counters = {}
def counters(device):
    if device not in _counters:
        _counters[device] = torch.zeros(1 << 14, dtype=torch.int32, device=device)
    return _counters[device]

def do_project(x, a, p=0.0, seed=None, SMS=132, BM=None, SPLIT=None, warps=4, stages=4, xw=None):
    T, K = x.shape; R = a.shape[0]
    BM = BM or (64 if T >= 4096 else 32 if T >= 1024 else 16)
    SPLIT = SPLIT or max(1, min(-(-K // 512), (2 * SMS) // triton.cdiv(T, BM)))
    low = torch.empty(T, R, dtype=x.dtype, device=x.device)
    parts = torch.empty(SPLIT if SPLIT > 1 else 0, T, R, dtype=torch.float32, device=x.device)
    BYTES = triton.cdiv(K, 128) * 32
    bits = torch.empty(T if p else 0, BYTES, dtype=torch.uint8, device=x.device)
    project[(triton.cdiv(T, BM), SPLIT)](x, a, parts, low, bits, seed, counters(x.device), xw, T, K, BYTES, int(p * 2**32), 1 / (1 - p),
        R=R, BM=BM, SPLIT=SPLIT, DROP=p > 0, COPY=xw is not None, num_warps=warps, num_stages=stages)
    return low, bits

def do_outer(z, small, up=None, bits=None, scale=1.0, back_scale=1.0, transpose=False, SMS=132, BM=64, BC=None, warps=4, stages=3):
    T, C = z.shape; R = small.shape[1]
    BC = BC or (256 if up is not None and T >= 2048 and C > 8192 else 128)
    chunks = triton.cdiv(C, BC)
    splits = max(1, min(triton.cdiv(T, BM), (2 * SMS) // chunks))
    each = triton.cdiv(triton.cdiv(T, splits), BM) * BM
    splits = triton.cdiv(T, each)
    parts = torch.empty(splits, C, R, dtype=torch.float32, device=z.device)
    has = up is not None
    back = torch.empty(chunks if has else 0, T, R, dtype=torch.float32, device=z.device)
    low = torch.empty(T if has else 0, R, dtype=z.dtype, device=z.device)
    out = torch.empty((R, C) if transpose else (C, R), dtype=torch.float32, device=z.device)
    BYTES = triton.cdiv(C, 128) * 32
    outer[(chunks, splits)](z, small, up, parts, back, bits, T, C, BYTES, each, R=R, BM=BM, BC=BC, BACK=has, DROP=bits is not None,
        num_warps=warps, num_stages=stages)
    B = 16
    bo = triton.cdiv(C, B)
    finish[(bo + (triton.cdiv(T, B) if has else 0),)](parts, out, back, low, C, T, splits, chunks, scale, back_scale, bo,
        R=R, B=B, TRANSPOSE=transpose, BACK=has, num_warps=1 if R <= 16 else 4)
    return out, low

def do_spread(low, b, scale=1.0, rows_r=False, bits=None, BM=64, BN=256, warps=4):
    T, R = low.shape; N = b.shape[1] if rows_r else b.shape[0]
    out = torch.empty(T, N, dtype=low.dtype, device=low.device)
    spread[(triton.cdiv(N, BN), triton.cdiv(T, BM))](low, b, bits, out, T, N, triton.cdiv(N, 128) * 32, scale,
        R=R, BM=BM, BN=BN, ROWS_R=rows_r, DROP=bits is not None, num_warps=warps)
    return out

def mask_of(bits, K):
    k = torch.arange(K, device=bits.device)
    return (bits[:, k // 128 * 32 + k % 32] >> (k % 128 // 32).to(torch.uint8)) & 1

def check(device="cpu", dtype=torch.float16, T=70, K=192, N=160, R=16):
    g = torch.Generator().manual_seed(0)
    rnd = lambda *s: torch.randn(s, generator=g).to(device)
    x, dy, a, b = rnd(T, K).to(dtype), rnd(T, N).to(dtype), rnd(R, K), rnd(N, R)
    seed = torch.tensor([5], dtype=torch.int64, device=device)
    err = lambda f, w: ((f.double() - w.double()).norm() / w.double().norm()).item()
    worst = {}
    for p in (0.0, 0.3):
        xw = torch.full((T, K + R), float("nan"), dtype=dtype, device=device)
        low, bits = do_project(x, a, p, seed, SPLIT=2 if T < 100 else None, xw=xw)
        assert torch.equal(xw, torch.cat((x, low), 1)), "copy"
        m = mask_of(bits, K).double() / (1 - p) if p else torch.ones(T, K, device=device, dtype=torch.float64)
        if p: worst["kept"] = 1 - (m > 0).double().mean().item()
        worst[f"project {p}"] = err(low, (x.double() * m) @ a.double().T)
        db, back = do_outer(dy, low, up=b, scale=2.0, back_scale=2.0)
        worst[f"dB {p}"] = err(db, 2 * dy.double().T @ low.double()); worst[f"back {p}"] = err(back, 2 * dy.double() @ b.double())
        da, _ = do_outer(x, back, bits=bits if p else None, scale=1 / (1 - p), transpose=True)
        worst[f"dA {p}"] = err(da, back.double().T @ (x.double() * m))
        worst[f"dX0 {p}"] = err(do_spread(back, a, 1 / (1 - p), True, bits if p else None), (back.double() @ a.double()) * m)
    worst["Y0"] = err(do_spread(low, b, 2.0), 2 * low.double() @ b.double().T)
    return worst

if __name__ == "__main__":
    for k, v in check().items(): print(f"{k:14} {v:.2e}")
