"""HLO's text read: headers, shapes, attributes over several lines, groups of devices in each of their forms."""

import pytest

from jaxalign.plan import hlo

TEXT = """HloModule jit_step, is_scheduled=true, num_partitions=4

FileNames
1 "a.py"

StackFrames
1 {file_location_id=1 parent_frame_id=1}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main.1_spmd (p: bf16[2,8], /*index=1*/q: (s32[], f32[4])) -> (bf16[2,8], f32[4]) {
  %p = bf16[2,8]{1,0:T(8,128)(2,1)S(1)} parameter(0), metadata={op_name="state.params[\\'policy\\']"}
  %q = (s32[]{:T(128)}, f32[4]{0:T(128)}) parameter(1)
  %g = f32[4]{0:T(128)} get-tuple-element(%q), index=1
  %kernel.1 = bf16[2,8]{1,0:T(8,128)(2,1)} custom-call(%p, /*index=1*/%g), custom_call_target="k", attributes={note={
"block": 2
}}, metadata={op_name="a/b"}
  ROOT %t = (bf16[2,8]{1,0}, f32[4]{0}) tuple(%kernel.1, %g), sharding={{replicated}, {replicated}}
}
"""


def test_computations_and_instructions():
    module = hlo.parse(TEXT)
    assert (module.name, module.num_devices, module.tiled) == ("jit_step", 4, True)
    assert set(module.computations) == {"add", "main.1_spmd"}
    entry = module.entry
    assert [x.opcode for x in entry.instructions] == [
        "parameter",
        "parameter",
        "get-tuple-element",
        "custom-call",
        "tuple",
    ]
    p, kernel = entry.by_name["p"], entry.by_name["kernel.1"]
    assert p.shapes == (hlo.Shape("bf16", (2, 8), 1),)
    assert p.op_name == "state.params['policy']"
    assert entry.by_name["q"].shapes == (hlo.Shape("s32", ()), hlo.Shape("f32", (4,)))
    assert (kernel.operands, kernel.op_name) == (("p", "g"), "a/b")
    assert entry.root == "t"
    assert [x.name for x in entry.users["g"]] == ["kernel.1", "t"]
    assert entry.parameters == {0: "p", 1: "q"}


@pytest.mark.parametrize(
    "written, expected",
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups={}", ((0, 1, 2, 3),)),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_0','axis_1'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['axis_0'=4] {'axis_0':(2)2}", ((0, 1), (2, 3))),
        ("source_target_pairs={{0,1},{1,0},{2,3},{3,2}}", ((0, 1), (2, 3))),
        ("source_target_pairs={{0,1},{1,2}}", ((0, 1, 2),)),
    ],
)
def test_groups(written, expected):
    text = TEXT.replace('custom_call_target="k"', written)
    assert hlo.groups(hlo.parse(text).entry.by_name["kernel.1"], 4) == expected


def test_no_program():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("nothing")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (TEXT[: TEXT.index("ROOT %t")], "main.1_spmd"),  # cut off
        (TEXT[TEXT.index("  %p = ") :], "ENTRY"),
        ("ENTRY %m () -> f32[] {\n  ROOT %a = f32[] copy(%a)\n}\n", "'a'"),
        ("ENTRY %m () -> f32[] {\n  %a = f32[] copy(%b)\n  ROOT %b = f32[] copy(%a)\n}\n", "'b'"),
        ("ENTRY %m () -> f32[] {\n  ROOT %a = f32[] call(), to_apply=%m\n}\n", "'m'"),
        ("ENTRY %m () -> f32[] {\n  ROOT %a = f32[] call(), to_apply=%f\n}\n%f () -> f32[] {\n}\n", "'f'"),
    ],
)
def test_a_text_that_is_no_schedule_says_where(text, word):
    with pytest.raises(ValueError, match=word):
        hlo.parse(text)


def test_what_is_missing_is_named():
    text = "ENTRY %m () -> f32[] {\n  ROOT %a = f32[] call(%x), to_apply=%f\n}\n"
    module = hlo.parse(text)
    for names, name in ((module.computations, "f"), (module.entry.by_name, "x"), (module.entry.parameters, 0)):
        with pytest.raises(ValueError, match=repr(name)):
            names[name]
