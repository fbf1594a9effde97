"""What the builder leaves for graphs that replay, and the memory that vLLM is told of."""

from types import SimpleNamespace as Bag

import pytest

pytest.importorskip("vllm.config", reason="make test-vllm installs vLLM")

import torch
import vllm
from engines import generate, host_tokens, prompt, serve
from test_step import MAX_ROWS, Batch, maker, starts
from tidal_vllm_cpu.backend import TidalTorchBuilder

from tidaldecode.errors import TidalError
from tidaldecode.integrations.vllm import memory, mixins
from tidaldecode.integrations.vllm.step import DecodeStep, StepMaker


def builder() -> TidalTorchBuilder:
    """A builder without an engine."""
    made = object.__new__(TidalTorchBuilder)
    made._maker, made._captured = maker(), False
    return made


def common(*lengths: int, prefilling: tuple[bool, ...] = (), queries: int = 1) -> Bag:
    """A batch of rows that decode, or prefill so many tokens, as the model runner describes it."""
    batch = Batch(*lengths)
    return Bag(
        query_start_loc=starts(*(queries for _ in lengths)),
        query_start_loc_cpu=starts(*(queries for _ in lengths)),
        max_query_len=queries,
        max_seq_len=max(lengths),
        seq_lens=batch.seq_lens,
        block_table_tensor=batch.block_table,
        is_prefilling=torch.tensor(prefilling, dtype=torch.bool),
        num_reqs=len(lengths),
        num_actual_tokens=queries * len(lengths),
    )


def test_a_batch_within_the_budget_is_the_dense_backends_altogether():
    assert builder().build(0, common(6, 5)).tidal is None
    assert builder().build(0, common(7, 5)).tidal is not None


def test_a_captured_step_is_ours_for_any_length():
    assert builder().build_for_cudagraph_capture(common(1, 1)).tidal is not None


def test_a_short_batch_refreshes_what_a_graph_reads():
    """A graph that was captured replays for it, though its own step is thrown away."""
    made = builder()
    captured = made.build_for_cudagraph_capture(common(1, 1)).tidal
    made.build(0, common(20, 19, prefilling=(True, False)))
    assert captured.state.whole_lens.tolist() == [20, 0]
    assert made.build(0, common(6, 5, prefilling=(False, True))).tidal is None
    assert captured.state.whole_lens.tolist() == [0, 5]
    made.build(0, common(6, 5))
    assert captured.state.whole_lens.tolist() == [0, 0]


@pytest.mark.parametrize("batch", [common(6, 5), common(20, 19, queries=3)])
def test_the_first_batch_compiles_the_kernels_whatever_it_is(batch):
    made = builder()
    assert made.build(0, batch).tidal is None
    made._maker.is_warm = False
    assert made.build(0, batch).tidal.dense
    assert not made.build(0, common(20, 19)).tidal.dense


def test_an_engine_that_has_to_compile_first_decodes_the_same(monkeypatch):
    """The budget is above every context: all is the dense backend's, the first batch as well."""
    compiled = []
    begin, prompts = StepMaker.__init__, [prompt(40, 1), prompt(9, 2)]

    def cold(self, *args, **options):
        begin(self, *args, **options)
        self.is_warm = False
        compiled.append(self)

    monkeypatch.setattr(StepMaker, "__init__", cold)
    monkeypatch.setattr(DecodeStep, "attend", lambda *_, **__: pytest.fail("not the dense backend"))
    engine = serve({"budget": 512})
    assert generate(engine, prompts, 8) == host_tokens(prompts, 8)
    assert compiled and all(one.is_warm for one in compiled)


@pytest.mark.skipif(
    vllm.__version__.startswith("0.33."),
    reason="vLLM 0.33's CPU runner measures nothing when eager",
)
def test_an_engine_claims_memory_while_it_is_measured_and_keeps_none(monkeypatch):
    claimed = []
    monkeypatch.setattr(memory, "claim", lambda device, count: claimed.append(count))
    assert mixins.memory is memory
    engine = serve({"budget": 32})
    assert claimed and set(claimed) == {claimed[0]}
    config = engine.llm_engine.vllm_config
    assert claimed[0] == mixins.work_memory(config).claimed > 3 * 512 * 4 * 8
    assert not memory._claims
    assert config.scheduler_config.max_num_seqs <= MAX_ROWS


def test_a_row_that_does_not_fit_stops_the_engine():
    options = {"budget": 32, "granularity": "query_head", "scratch_mib": 1}
    with pytest.raises(TidalError, match="scratch_mib: expected at least 2 for one row"):
        serve(options, max_model_len=16384, kv_cache_memory_bytes=256 << 20)
