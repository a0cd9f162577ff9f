"""Which function of semantics.h an opcode is, and the types of its result and operands.

An opcode that is in none of these tables is an error, with all its modifiers: nothing is guessed from a part of one.
"""

from dataclasses import dataclass

INTEGERS = ("s16", "u16", "s32", "u32", "s64", "u64")
BITS = ("b16", "b32", "b64")
FLOATS = ("f32", "f64")


@dataclass(frozen=True)
class Form:
    call: str  # a function of semantics.h, in namespace ptx
    result: str
    operands: tuple[str, ...]
    carries: bool = False  # reads or writes the condition code


def alike(call: str, count: int, names: str, types: tuple[str, ...], carries: bool = False) -> dict[str, Form]:
    """`name.type` for each name and type, where result and operands are all of that type."""
    return {f"{name}.{t}": Form(f"{call}<{t}>", t, (t,) * count, carries) for name in names.split() for t in types}


ARITHMETIC_OF_INTEGERS = {
    **alike("add", 2, "add", INTEGERS),
    **alike("sub", 2, "sub", INTEGERS),
    **alike("mul_lo", 2, "mul.lo", INTEGERS),
    **alike("mul_hi", 2, "mul.hi", INTEGERS),
    **alike("mad_lo", 3, "mad.lo", INTEGERS),
    **alike("mad_hi", 3, "mad.hi", INTEGERS),
    **alike("div", 2, "div", INTEGERS),
    **alike("rem", 2, "rem", INTEGERS),
    **alike("min", 2, "min", INTEGERS),
    **alike("max", 2, "max", INTEGERS),
    **alike("neg", 1, "neg", ("s16", "s32", "s64")),
    **alike("abs", 1, "abs", ("s16", "s32", "s64")),
    **{
        f"mul.wide.{t}": Form(f"mul_wide<{t}>", wide, (t, t))
        for t, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64"))
    },
    **{
        f"mad.wide.{t}": Form(f"mad_wide<{t}>", wide, (t, t, wide))
        for t, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64"))
    },
}

#: As long numbers are added, a word at a time.
CARRIES = {
    **alike("add_cc", 2, "add.cc", ("u32", "u64"), carries=True),
    **alike("addc_cc", 2, "addc.cc", ("u32", "u64"), carries=True),
    **alike("addc", 2, "addc", ("u32", "u64"), carries=True),
    **alike("sub_cc", 2, "sub.cc", ("u32", "u64"), carries=True),
    **alike("subc_cc", 2, "subc.cc", ("u32", "u64"), carries=True),
    **alike("subc", 2, "subc", ("u32", "u64"), carries=True),
    **alike("mad_lo_cc", 3, "mad.lo.cc", ("u32", "u64"), carries=True),
    **alike("mad_hi_cc", 3, "mad.hi.cc", ("u32", "u64"), carries=True),
    **alike("madc_lo_cc", 3, "madc.lo.cc", ("u32", "u64"), carries=True),
    **alike("madc_hi_cc", 3, "madc.hi.cc", ("u32", "u64"), carries=True),
    **alike("madc_lo", 3, "madc.lo", ("u32", "u64"), carries=True),
    **alike("madc_hi", 3, "madc.hi", ("u32", "u64"), carries=True),
}

LOGIC = {
    **alike("bit_and", 2, "and", (*BITS, "pred")),
    **alike("bit_or", 2, "or", (*BITS, "pred")),
    **alike("bit_xor", 2, "xor", (*BITS, "pred")),
    **alike("bit_not", 1, "not", (*BITS, "pred")),
    **{f"shl.{t}": Form(f"shl<{t}>", t, (t, "u32")) for t in BITS},
    **{f"shr.{t}": Form(f"shr<{t}>", t, (t, "u32")) for t in (*BITS, *INTEGERS)},
    "shf.l.wrap.b32": Form("shf_l_wrap", "b32", ("b32", "b32", "u32")),
    **{f"bfi.{t}": Form(f"bfi<{t}>", t, (t, t, "u32", "u32")) for t in ("b32", "b64")},
    "prmt.b32": Form("prmt", "b32", ("b32", "b32", "b32")),
    **{f"clz.{t}": Form(f"clz<{t}>", "u32", (t,)) for t in ("b32", "b64")},
}

ARITHMETIC_OF_FLOATS = {
    **alike("add", 2, "add add.rn", FLOATS),
    **alike("sub", 2, "sub sub.rn", FLOATS),
    **alike("mul", 2, "mul mul.rn", FLOATS),
    **alike("fma", 3, "fma.rn", FLOATS),
    **alike("div", 2, "div.rn", FLOATS),
    **alike("rcp", 1, "rcp.rn", FLOATS),
    **alike("min", 2, "min", FLOATS),
    **alike("max", 2, "max", FLOATS),
    **alike("neg", 1, "neg", FLOATS),
    **alike("abs", 1, "abs", FLOATS),
    **alike("copysign", 2, "copysign", FLOATS),
    "add.rz.f32": Form("add_rz", "f32", ("f32", "f32")),
    "mul.rz.f32": Form("mul_rz", "f32", ("f32", "f32")),
    "fma.rm.f32": Form("fma_rm", "f32", ("f32", "f32", "f32")),
}

#: Correctly rounded here; what uses them is not compared bit by bit.
APPROXIMATIONS = {
    "ex2.approx.f32": Form("ex2_approx", "f32", ("f32",)),
    "ex2.approx.ftz.f32": Form("ex2_approx_ftz", "f32", ("f32",)),
    "rcp.approx.ftz.f32": Form("rcp_approx_ftz", "f32", ("f32",)),
    "rcp.approx.ftz.f64": Form("rcp_approx_ftz", "f64", ("f64",)),
    "div.approx.f32": Form("div_approx", "f32", ("f32", "f32")),
}

COMPARISONS = {
    **{
        f"setp.{name}.{t}": Form(f"{'neu' if name == 'ne' else name}<{t}>", "pred", (t, t))
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for t in INTEGERS
    },
    **{f"setp.eq.{t}": Form(f"eq<{t}>", "pred", (t, t)) for t in BITS},
    **{f"setp.ne.{t}": Form(f"neu<{t}>", "pred", (t, t)) for t in BITS},
    **{
        f"setp.{name}.{t}": Form(f"{name}<{t}>", "pred", (t, t))
        for name in ("eq", "ne", "lt", "le", "gt", "ge", "equ", "neu", "ltu", "leu", "gtu", "geu")
        for t in FLOATS
    },
    "set.gtu.u32.f16x2": Form("gtu_mask<fastmlp::Float16>", "u32", ("b32", "b32")),
    "set.gtu.u32.bf16x2": Form("gtu_mask<fastmlp::BFloat16>", "u32", ("b32", "b32")),
    **{f"selp.{t}": Form(f"selp<{t}>", t, (t, t, "pred")) for t in (*BITS, *INTEGERS, *FLOATS)},
}

MOVES = {
    **alike("mov", 1, "mov", (*BITS, *INTEGERS, *FLOATS, "pred")),
    # Global, local and generic addresses are the host's.
    **{
        f"cvta.{space}.u64": Form("mov<u64>", "u64", ("u64",)) for space in ("global", "to.global", "local", "to.local")
    },
}

CONVERSIONS = {
    **{
        f"cvt.{to}.{of}": Form(f"convert<{to}, {of}>", to, (of,))
        for to in ("u16", "s16", "u32", "s32", "u64", "s64")
        for of in ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
        if to != of
    },
    **{f"cvt.rn.{to}.{of}": Form(f"convert<{to}, {of}>", to, (of,)) for to in FLOATS for of in INTEGERS},
    **{
        f"cvt.rni.{to}.{of}": Form(f"to_nearest_integer<{to}, {of}>", to, (of,))
        for to in ("s32", "s64")
        for of in FLOATS
    },
    "cvt.rn.f32.f64": Form("convert<f32, f64>", "f32", ("f64",)),
    "cvt.f64.f32": Form("convert<f64, f32>", "f64", ("f32",)),
    "cvt.rni.f32.f32": Form("round_to_integer", "f32", ("f32",)),
    "cvt.sat.f32.f32": Form("saturate", "f32", ("f32",)),
    "cvt.f32.f16": Form("from_half", "f32", ("b16",)),
    "cvt.rn.f16.f32": Form("to_half", "b16", ("f32",)),
    "cvt.rn.bf16.f32": Form("to_bfloat16", "b16", ("f32",)),
    **{
        f"cvt.rn{above_zero and '.relu'}.{name}.f32": Form(f"to_pair{above_zero}<{S}>", "b32", ("f32", "f32"))
        for above_zero in ("", "_above_zero")
        for name, S in (("f16x2", "fastmlp::Float16"), ("bf16x2", "fastmlp::BFloat16"))
    },
}

#: What is a function of its operands alone.
FORMS: dict[str, Form] = {
    **ARITHMETIC_OF_INTEGERS,
    **CARRIES,
    **LOGIC,
    **ARITHMETIC_OF_FLOATS,
    **APPROXIMATIONS,
    **COMPARISONS,
    **MOVES,
    **CONVERSIONS,
}

MEMORY_TYPES = ("u8", "s8", "b8", *BITS, *INTEGERS, *FLOATS)

#: Loads and stores: the state space, the type and how many elements.
LOADS = {
    f"ld.{words}{vector}.{t}": (space, t, count)
    for words, space in (
        ("global", "global"),
        ("global.nc", "global"),
        ("shared", "shared"),
        ("local", "local"),
        ("param", "param"),
    )
    for vector, count in (("", 1), (".v2", 2), (".v4", 4))
    for t in MEMORY_TYPES
}
STORES = {
    f"st.{words}{vector}.{t}": (space, t, count)
    for words, space in (
        ("global", "global"),
        ("global.wb", "global"),
        ("shared", "shared"),
        ("local", "local"),
        ("param", "param"),
    )
    for vector, count in (("", 1), (".v2", 2), (".v4", 4))
    for t in MEMORY_TYPES
}

#: Tensor cores: the function, and how many registers A, B and C have.
PRODUCTS = {
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": ("mma_m16n8k16<fastmlp::Float16>", 4, 2),
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32": ("mma_m16n8k16<fastmlp::BFloat16>", 4, 2),
    "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32": ("mma_m16n8k8<fastmlp::Float16>", 2, 1),
}

MATRIX_LOADS = {
    "ldmatrix.sync.aligned.m8n8.x4.shared.b16": "ldmatrix<false>",
    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16": "ldmatrix<true>",
}

SPECIAL_REGISTERS = {
    f"%{name}.{axis}": f"{variable}.{axis}"
    for name, variable in (
        ("tid", "threadIdx"),
        ("ntid", "blockDim"),
        ("ctaid", "blockIdx"),
        ("nctaid", "gridDim"),
    )
    for axis in "xyz"
}
