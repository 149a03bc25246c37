"""The common model tests of Transformers on our classes: each passes, or EXPECTED says why not."""

import os
import re
import unittest
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
import transformers
import transformers_sdist
from backbones import SMALL
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.utils import is_torch_accelerator_available

from msa_hf import MSAConfig, MSAForCausalLM
from msa_hf.modeling.errors import DataUnavailableError
from msa_hf.modeling.memory_bank import DenseVectors, LayerMemory, MemoryBank
from msa_hf.modeling.modeling_msa import MSAModel

REQUIREMENTS = Path(__file__).resolve().parent.parent / "requirements" / "runtime.txt"
# Two layers, as the common tests want it; the upper one routes.
SIZES = {**SMALL, "vocab_size": 99, "num_hidden_layers": 2, "initializer_range": 0.02}
DOCUMENTS = 4
MEMORY, PACKED = "llama, reading a memory", "llama, packed rows"
ROUTERS = ("llama", "qwen2", "qwen3")  # with router maps that nothing reads
VARIANTS = {
    "llama": ("llama", {}),
    "llama, no router layers": ("llama", {"router_layers": []}),
    MEMORY: ("llama", {"aux_loss_method": "BCE"}),
    PACKED: ("llama", {"aux_loss_method": "BCE"}),
    "mistral, q and k route": ("mistral", {"separate_router": False}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "qwen3, no router layers": ("qwen3", {"router_layers": []}),
}


@dataclass(frozen=True)
class Expected:
    """Tests that are skipped or fail, with a part of what they say (a pattern), and why that is right."""

    why: str
    kind: str
    says: str
    tests: str
    variants: tuple[str, ...] = tuple(VARIANTS)
    maybe: bool = False  # on this machine they may pass as well


EXPECTED = (
    Expected(
        "For accelerators, several of them, and packages that serve them; the project's tests run on a CPU.",
        "skipped",
        "test requires|test is slow",
        """test_can_load_with_device_context_manager test_can_load_with_global_device_set test_cpu_offload
        test_disk_offload_bin test_disk_offload_safetensors test_flex_attention_with_grads
        test_sdpa_can_compile_dynamic test_sdpa_can_dispatch_on_flash test_torch_compile_for_training
        test_model_parallelism test_kernels_can_load_without_crashing
        test_flash_attn_kernels_inference_equivalence test_flash_attn_kernels_mps_inference_equivalence
        test_flash_attn_2_can_compile_with_attention_mask_None_without_graph_break
        test_flash_attn_2_can_dispatch_composite_models test_flash_attn_2_fp32_ln
        test_flash_attn_2_from_config
        test_flash_attn_2_inference_equivalence test_flash_attn_2_inference_equivalence_right_padding
        test_flash_attn_3_can_dispatch_composite_models test_flash_attn_3_from_config
        test_flash_attn_3_inference_equivalence test_flash_attn_3_inference_equivalence_right_padding
        test_flash_attn_4_can_dispatch_composite_models test_flash_attn_4_from_config
        test_flash_attn_4_inference_equivalence test_flash_attn_4_inference_equivalence_right_padding
        test_resize_embeddings_untied_with_deepspeed test_resize_embeddings_untied_with_deepspeed_multi_gpu
        test_resize_tokens_embeddings_with_deepspeed
        test_resize_tokens_embeddings_with_deepspeed_multi_gpu""",
        maybe=is_torch_accelerator_available(),
    ),
    Expected(
        "One decoder of text: no towers with configurations of their own.",
        "skipped",
        "composite|does not support SDPA|No subconfigs",
        """test_attn_implementation_composite_models test_can_set_attention_dynamically_composite_model
        test_sdpa_can_dispatch_composite_models test_internal_model_config_and_subconfig_are_same""",
    ),
    Expected(
        "No encoder, no experts, no sliding window (refused by MSAConfig), no learnt positions.",
        "skipped",
        "does not support (grouped_mm|sliding)|sparse experts|output_router_logits|position emb|sequence-to",
        """test_eager_matches_batched_and_grouped_inference_0_fp16
        test_eager_matches_batched_and_grouped_inference_1_fp32
        test_eager_matches_batched_and_grouped_inference_2_bf16 test_moe_models_record_router_logits
        test_output_router_logits_from_config test_sliding_window_mask test_resize_position_vector_embeddings
        test_encoder_decoder_loss_no_double_shift""",
    ),
    Expected(
        "RoPE turns whole heads, in one dimension; with packed rows there is no class without a head to ask.",
        "skipped",
        "partial rope|axial RoPE|no `base_model_class`",
        "test_model_rope_with_partial_rotation test_vision_axial_rope",
    ),
    Expected(
        "Packed rows are an input of MSAForCausalLM alone; the other variants ask MSAModel.",
        "skipped",
        "no `base_model_class`",
        """test_model_rope_scaling_frequencies test_model_rope_scaling_from_config_0_linear
        test_model_rope_scaling_from_config_1_dynamic test_model_rope_scaling_from_config_2_yarn""",
        (PACKED,),
    ),
    Expected(
        "Every weight may be kept in half precision, and has the same name in a file as in the model.",
        "skipped",
        "_keep_in_fp32_modules|No conversion found",
        """test_keep_in_fp32_modules test_keep_in_fp32_modules_exist test_can_load_from_already_mapped_keys
        test_reverse_loading_mapping""",
    ),
    Expected(
        "No release on the index has GenerationTesterMixin; see test_generation.py, test_conversion.py and "
        "test_turboquant_generation.py for the ways of generation.",
        "failed",
        "must inherit from `GenerationTesterMixin`",
        "test_generation_tester_mixin_inheritance",
    ),
    Expected(
        "Routers learn from the scores of documents, and a text alone has none; the packed rows have.",
        "failed",
        r"router_[qk]_proj\.0\.weight in MSAForCausalLM has no gradient",
        """test_training_gradient_checkpointing test_training_gradient_checkpointing_use_reentrant_false
        test_training_gradient_checkpointing_use_reentrant_true""",
        ROUTERS,
    ),
    Expected(
        "A memory is read, not trained: its router keys were made before, so their map gets no gradient.",
        "failed",
        r"router_k_proj\.0\.weight in MSAForCausalLM has no gradient",
        """test_training_gradient_checkpointing test_training_gradient_checkpointing_use_reentrant_false
        test_training_gradient_checkpointing_use_reentrant_true""",
        (MEMORY,),
    ),
    Expected(
        "The test counts on one run of every layer; documents and question are two. The gradients are "
        "compared by test_checkpointing_of_packed_rows.",
        "failed",
        "size of tensor",
        "test_training_gradient_checkpointing test_training_gradient_checkpointing_use_reentrant_false",
        (PACKED,),
    ),
    Expected(
        "Refused: a reentrant checkpoint would lose the gradients of the documents' vectors silently.",
        "failed",
        "use_reentrant",
        "test_training_gradient_checkpointing_use_reentrant_true",
        (PACKED,),
    ),
    Expected(
        "Hidden states and attentions are those of the row of question and answer, which is shorter than the "
        "packed row; documents attend in rows of their own.",
        "failed",
        "Lists differ",
        "test_attention_outputs test_hidden_states_output",
        (PACKED,),
    ),
    Expected(
        "Documents that a sample has not score -inf, and number 0 is no document.",
        "failed",
        "inf.*document_scores",
        "test_batching_equivalence",
        (PACKED,),
    ),
)


class ModelTester:
    """What the common tests ask of a model's own tests: a tiny configuration and inputs for it."""

    causal_lm_class, base_model_class, config_class = MSAForCausalLM, MSAModel, MSAConfig
    is_training = True
    batch_size, seq_length = 3, 12
    vocab_size, hidden_size = SIZES["vocab_size"], SIZES["hidden_size"]
    num_hidden_layers, num_attention_heads = SIZES["num_hidden_layers"], SIZES["num_attention_heads"]

    def __init__(self, variant: str):
        self.variant = variant
        self.backbone, self.fields = VARIANTS[variant]

    def get_config(self) -> MSAConfig:
        own = {"sliding_window": None} if self.backbone == "mistral" else {}
        backbone = AutoConfig.for_model(self.backbone, **SIZES, **own)
        return MSAConfig.from_backbone(backbone, **{"chunk_size": 2, "top_k_documents": 2, **self.fields})

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        shape = (self.batch_size, self.seq_length)
        # Above the tokens that pad, begin and end.
        inputs = {"input_ids": torch.randint(3, self.vocab_size, shape)}
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
        if self.variant == MEMORY:
            inputs["memory"] = random_bank(config)
        if self.variant == PACKED:
            # A template token, two documents, the question, the response: see `packed_msa`.
            roles = [-2, 1, 1, 1, 2, 2, 2, 0, 0, 0, -1, -1]
            inputs["doc_ids"] = torch.tensor([roles] * self.batch_size)
        return config, inputs

    def document_labels(self) -> dict:
        """The first document is the one to find, where there are documents."""
        documents = {MEMORY: DOCUMENTS, PACKED: 2}.get(self.variant)
        one = [1] + [0] * ((documents or 1) - 1)
        return {"batch_aux_labels": [one] * self.batch_size} if documents else {}


def random_bank(config: MSAConfig) -> MemoryBank:
    """Random vectors of a few documents of three chunks."""
    width = config.num_key_value_heads * config.head_dim
    counts = torch.full((DOCUMENTS,), 3 * config.chunk_size)
    layers = {
        layer: LayerMemory(*(DenseVectors(torch.randn(3 * DOCUMENTS, width)) for _ in range(3)))
        for layer in config.router_layers
    }
    return MemoryBank([""] * DOCUMENTS, counts, config.memory_settings, layers)


class Outcomes(unittest.TestResult):
    """What became of each test, as (kind, message) by name; none where it passed. A sub-test is its test."""

    def __init__(self):
        super().__init__()
        self.found: dict[str, list[tuple[str, str]]] = {}

    def startTest(self, test):
        super().startTest(test)
        self.found[test._testMethodName] = []

    def addSkip(self, test, reason):
        name = getattr(test, "test_case", test)._testMethodName
        self.found.setdefault(name, []).append(("skipped", reason))

    def addError(self, test, error):
        self.found[test._testMethodName].append(("failed", f"{error[0].__name__}: {error[1]}"))

    addFailure = addError

    def addSubTest(self, test, subtest, error):
        if error is not None:
            self.addError(test, error)


def surprises(found: dict[str, list[tuple[str, str]]], variant: str, expected=EXPECTED) -> list[str]:
    """What did not go as expected, one line each."""
    wanted = {test: own for own in expected if variant in own.variants for test in own.tests.split()}
    lines = [f"{name} is expected and does not exist" for name in wanted if name not in found]
    for name, outcomes in found.items():
        own = wanted.get(name)
        if own is None:
            lines += [f"{name} {kind}: {message}" for kind, message in outcomes]
        elif not outcomes and not own.maybe:
            lines.append(f"{name} passes; it was expected to be {own.kind}: {own.why}")
        for kind, message in outcomes if own else []:
            if kind != own.kind or not re.search(own.says, message):
                lines.append(f"{name} {kind}, not as expected ({own.kind}, {own.says}): {message}")
    return lines


@pytest.fixture(scope="module")
def common(tmp_path_factory, pytestconfig):
    if transformers.__version__ != transformers_sdist.VERSION:
        pytest.skip(f"EXPECTED is that of Transformers {transformers_sdist.VERSION}")
    for marker in transformers_sdist.MARKERS:
        pytestconfig.addinivalue_line("markers", marker)
    return transformers_sdist.common_tests(tmp_path_factory.mktemp("sdist"))


@pytest.fixture
def names_known(monkeypatch):
    """The common tests tell what a class is for from its name in these tables, which know no plug-in."""
    kind = MSAConfig.model_type
    monkeypatch.setitem(modeling_auto.MODEL_MAPPING_NAMES, kind, "MSAModel")
    monkeypatch.setitem(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, kind, "MSAForCausalLM")


@pytest.mark.parametrize("variant", VARIANTS)
def test_common_tests_pass_or_are_expected(variant, common, names_known):
    class MSAModelTest(
        common["test_modeling_common"].ModelTesterMixin,
        common["test_training_mixin"].TrainingTesterMixin,
        unittest.TestCase,
    ):
        all_model_classes = (MSAForCausalLM,) if variant == PACKED else (MSAModel, MSAForCausalLM)
        model_tester = ModelTester(variant)
        # The year of a class is looked for in a line that our files have not; without it a test is left out.
        test_can_init_all_missing_weights_before_2023 = True

        def test_config(self):
            common["test_configuration_common"].ConfigTester(self, config_class=MSAConfig).run_common_tests()

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
            wanted = return_labels and model_class is MSAForCausalLM
            return inputs | (self.model_tester.document_labels() if wanted else {})

    outcomes = Outcomes()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unittest.defaultTestLoader.loadTestsFromTestCase(MSAModelTest).run(outcomes)
    assert len(outcomes.found) > 150
    assert sum(not own for own in outcomes.found.values()) > 90, "most of them must really run"
    assert not (lines := surprises(outcomes.found, variant)), "\n".join(lines)


def test_list_of_expected_outcomes_is_checked():
    own = Expected("why", "failed", "no gradient", "test_a test_b", ("llama",))
    as_said = {"test_a": [("failed", "has no gradient")], "test_b": [("failed", "no gradient")], "test_c": []}
    assert surprises(as_said, "llama", [own]) == []
    for change, line in (
        ({"test_a": []}, "test_a passes"),
        ({"test_a": [("failed", "another reason")]}, "test_a failed, not as expected"),
        ({"test_a": [("skipped", "no gradient")]}, "test_a skipped, not as expected"),
        ({"test_c": [("skipped", "too slow")]}, "test_c skipped: too slow"),
        ({"test_c": [("failed", "wrong")]}, "test_c failed: wrong"),
    ):
        [found] = surprises(as_said | change, "llama", [own])
        assert found.startswith(line)
    del as_said["test_b"]
    assert surprises(as_said, "llama", [own]) == ["test_b is expected and does not exist"]
    assert surprises(as_said, "qwen3", [own]) == ["test_a failed: has no gradient"]


def test_archive_is_of_the_version_that_is_required():
    required = re.findall(r'^transformers==(\S+); python_version >= "3.11"$', REQUIREMENTS.read_text(), re.M)
    assert required == [transformers_sdist.VERSION]


def test_archive_is_checked_before_it_is_read(tmp_path, monkeypatch):
    archive = transformers_sdist.fetch_sdist()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(archive.parent))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    fetched = transformers_sdist.fetch_sdist(tmp_path / "cache")
    assert fetched.read_bytes() == archive.read_bytes()
    fetched.write_bytes(b"damaged")
    assert transformers_sdist.fetch_sdist(tmp_path / "cache").read_bytes() == archive.read_bytes()
    monkeypatch.setattr(transformers_sdist, "SHA256", "0" * 64)
    with pytest.raises(DataUnavailableError, match="could not be fetched"):
        transformers_sdist.fetch_sdist(tmp_path / "other")
    assert not list((tmp_path / "other").iterdir())


def test_arguments_of_every_configuration_are_complete():
    given = transformers_sdist.CONFIG_ARGUMENTS
    assert {field.name for field in fields(PreTrainedConfig)} - given.keys() == {"transformers_version"}
    assert not [name for name, value in given.items() if getattr(PreTrainedConfig(), name) == value]


def packed_row(**checkpointing):
    """A model in training and its inputs of packed rows, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tester = ModelTester(PACKED)
        config, inputs = tester.prepare_config_and_inputs_for_common()
        model = MSAForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    return model, {**inputs, **tester.document_labels(), "labels": inputs["input_ids"].clone()}


def test_checkpointing_of_packed_rows():
    gradients = []
    for checkpointing in ({}, {"use_reentrant": False}):
        model, inputs = packed_row(**checkpointing)
        model(**inputs).loss.backward()
        assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)
    model, inputs = packed_row(use_reentrant=True)
    with pytest.raises(ValueError, match='"use_reentrant" False'):
        model(**inputs)
    model.eval()(**inputs)  # nothing is checkpointed outside training


def test_packed_rows_may_be_given_as_embeddings():
    model, inputs = packed_row()
    loss = model(**inputs).loss
    embeddings = model.model.embed_tokens(inputs.pop("input_ids"))
    assert torch.equal(model(**inputs, inputs_embeds=embeddings).loss, loss)
    for wrong in ({}, {"inputs_embeds": embeddings, "input_ids": inputs["labels"]}):
        with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
            model(**inputs, **wrong)
    with pytest.raises(ValueError, match=r"doc_ids must have the shape of input_ids \(3, 12\)"):
        model(**inputs | {"doc_ids": inputs["doc_ids"][:, 1:]}, inputs_embeds=embeddings)
