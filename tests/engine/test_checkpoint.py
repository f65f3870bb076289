"""Wrong checkpoints are refused with a typed error that says what to do; valid variants are read."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bge_rerank_integrations import Scorer
from bge_rerank_integrations.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    CorruptCheckpointError,
    DeviceError,
    HubUnreachableError,
    UnsupportedCheckpointError,
)

Tensors = dict[str, torch.Tensor]
PAIRS = [("what is a panda?", "A bear."), ("panda", "hi")]


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """Return a copy of a valid checkpoint, for a test to change."""
    return Path(shutil.copytree(checkpoint, tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, edit: Callable[[Tensors], Tensors]) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(edit(tensors), path, metadata={"format": "pt"})


def without(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(prefix)}


def with_value(value: float) -> Callable[[Tensors], Tensors]:
    def edit(tensors: Tensors) -> Tensors:
        tensors["roberta.encoder.layer.1.output.dense.weight"][3, 4] = value
        return tensors

    return edit


def refuse(folder: Path, error: type[CheckpointError], message: str, **settings: Any) -> None:
    with pytest.raises(error, match=message) as caught:
        Scorer(folder, device="cpu", **settings)
    assert type(caught.value) is error


def test_an_embedding_model_is_refused(folder: Path) -> None:
    edit_config(folder, architectures=["XLMRobertaModel"])
    edit_weights(
        folder, lambda t: {n.removeprefix("roberta."): w for n, w in without("classifier")(t).items()}
    )
    refuse(folder, UnsupportedCheckpointError, "An embedding model has no relevance head")


def test_an_embedding_model_with_the_config_of_a_reranker_is_refused(folder: Path) -> None:
    edit_weights(folder, without("classifier."))
    refuse(folder, UnsupportedCheckpointError, "no relevance head .*use a reranker such as")


def test_the_error_names_only_the_tensors_of_the_relevance_head(folder: Path) -> None:
    edit_weights(folder, without("classifier.out_proj.weight"))
    edit_weights(folder, without("roberta.encoder.layer.1."))
    refuse(folder, UnsupportedCheckpointError, r"no relevance head \(classifier\.out_proj\.weight\)")


def test_a_path_that_is_not_utf8(folder: Path, tmp_path: Path) -> None:
    copy = Path(os.fsdecode(os.fsencode(tmp_path) + b"/m\xff"))
    try:
        shutil.copytree(folder, copy)
    except OSError:
        pytest.skip("the file system refuses such names")
    with pytest.raises(CheckpointError, match="is not UTF-8; rename the folder"):
        Scorer(copy, device="cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "bert", "architectures": ["BertForSequenceClassification"]},
            "'bert' checkpoint .*It is a cross-encoder .*runs XLM-RoBERTa cross-encoders: use BAAI/bge-.*'embedded'",
        ),
        (
            {"model_type": "deberta-v2", "architectures": ["DebertaV2ForSequenceClassification"]},
            "'deberta-v2' .*It is a cross-encoder",
        ),
        ({"model_type": "bert", "architectures": None}, r"'bert' checkpoint\. This package runs"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "An embedding model has no relevance head"),
        ({"model_type": "gemma", "architectures": ["GemmaForCausalLM"]}, "'gemma' .*It is a language model"),
        ({"architectures": ["XLMRobertaForMaskedLM"]}, "XLMRobertaForMaskedLM"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, "num_labels = 2"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map.*never runs"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ({"is_decoder": True}, "is_decoder = True"),
    ],
)
def test_another_architecture_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    refuse(folder, UnsupportedCheckpointError, message)


def test_a_lora_adapter_is_refused(folder: Path) -> None:
    adapter = {"base_model_name_or_path": "BAAI/bge-reranker-base", "peft_type": "LORA"}
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "adapter_model.safetensors").touch()
    refuse(
        folder,
        UnsupportedCheckpointError,
        "is a LoRA adapter.*Merge it into its base model first.*base, lora, merged = 'BAAI/bge-reranker-base', .*merge_and_unload",
    )
    (folder / "adapter_config.json").write_text("{}")
    refuse(folder, UnsupportedCheckpointError, "'BASE_MODEL'")


def test_a_lora_adapter_with_a_config_and_pickled_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text("{}")
    (folder / "adapter_model.bin").touch()
    refuse(folder, UnsupportedCheckpointError, "is a LoRA adapter")


def cache_entry(checkpoint: Path, cache: Path) -> tuple[Path, Path]:
    """Return the entry of a hub cache for the checkpoint, and its snapshot, which consists of links."""
    entry = cache / "models--someone--reranker"
    snapshot = entry / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copytree(checkpoint, entry / "blobs")
    for path in (entry / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    return entry, snapshot


def test_a_hub_cache_is_recognized_and_its_snapshot_is_named(
    checkpoint: Path, tmp_path: Path, scorer: Scorer
) -> None:
    entry, snapshot = cache_entry(checkpoint, tmp_path / "hub")
    refuse(
        entry,
        CheckpointNotFoundError,
        f"is an entry of a hub cache.*{snapshot}.*'someone/reranker'.*cache_folder",
    )
    refuse(entry / "snapshots", CheckpointNotFoundError, f"its subfolders do.*{snapshot}")
    refuse(entry.parent, CheckpointNotFoundError, "is a hub cache with someone/reranker")
    with Scorer(snapshot, device="cpu", dtype="float32") as real:
        assert real.score(PAIRS) == scorer.score(PAIRS)


def test_a_hub_cache_with_dangling_links_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    entry, snapshot = cache_entry(checkpoint, tmp_path)
    blobs = {path.name: path.read_bytes() for path in (entry / "blobs").iterdir()}
    for missing in ("config.json", "tokenizer.json", "model.safetensors"):
        (entry / "blobs" / missing).unlink()
        refuse(
            snapshot,
            CheckpointNotFoundError,
            f"{missing} is a link to a file that does not exist.*--local-dir",
        )
        (entry / "blobs" / missing).write_bytes(blobs[missing])
    shutil.rmtree(entry / "blobs")
    refuse(entry, CheckpointNotFoundError, "config.json is a link to a file that does not exist.*cp -rL")
    shutil.rmtree(entry / "snapshots")
    refuse(entry, CheckpointNotFoundError, "none of its snapshots.*hf download someone/reranker --local-dir")


def test_the_error_for_a_training_folder_names_its_checkpoints(folder: Path) -> None:
    inside = folder / "run"
    for number in (500, 1000):
        shutil.copytree(folder, inside / f"checkpoint-{number}", ignore=shutil.ignore_patterns("run"))
    (inside / "runs").mkdir()
    (inside / "training_args.bin").touch()
    message = f"its subfolders do.*: {inside}/checkpoint-500, {inside}/checkpoint-1000$"
    refuse(inside, CheckpointNotFoundError, message)
    shutil.copy(folder / "config.json", inside)
    refuse(inside, CheckpointNotFoundError, message)


def test_a_subfolder_that_cannot_be_read_does_not_hide_the_others(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = folder / "run"
    shutil.copytree(folder, inside / "model", ignore=shutil.ignore_patterns("run"))
    (inside / "lost+found").mkdir()
    iterdir = Path.iterdir

    def refuse_one(path: Path) -> Any:
        if path.name == "lost+found":  # the tests may run as root, who may read every folder
            raise PermissionError
        return iterdir(path)

    monkeypatch.setattr(Path, "iterdir", refuse_one)
    refuse(inside, CheckpointNotFoundError, f"its subfolders do.*: {inside}/model$")


def test_a_missing_layer_is_refused(folder: Path) -> None:
    edit_weights(folder, without("roberta.encoder.layer.1."))
    refuse(folder, CorruptCheckpointError, "16 tensor.s. .* missing.*encoder.layer.1.*download")


def test_an_extra_layer_is_refused(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    refuse(folder, CorruptCheckpointError, "16 tensor.s. do not belong.*encoder.layer.1")


def test_a_tensor_of_the_wrong_shape_is_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=64)
    refuse(folder, CorruptCheckpointError, "has shape .*but config.json requires")


def test_int8_weights_without_any_scale_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda t: {n: w.to(torch.int8) for n, w in t.items()})
    refuse(folder, UnsupportedCheckpointError, "stored as I8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float) -> None:
    edit_weights(folder, with_value(value))
    refuse(folder, CorruptCheckpointError, "output.dense.weight contains NaN or infinity")


def test_weights_that_overflow_in_the_requested_precision_are_refused(folder: Path) -> None:
    edit_weights(folder, lambda t: {n: w.double() for n, w in with_value(1e300)({n: w.double() for n, w in t.items()}).items()})  # fmt: skip
    refuse(folder, CorruptCheckpointError, "in torch.float32")


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_not_opened(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "executed")))
    refuse(folder, UnsupportedCheckpointError, "pickled weights only.*save_pretrained")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("size", [0, 4, 100, 10_000, -1])
def test_a_truncated_weight_file_is_refused(folder: Path, size: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refuse(folder, CorruptCheckpointError, "damaged or was not downloaded completely.*download it again")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_git_lfs_pointer_is_refused(folder: Path, name: str) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / name).write_text(pointer)
    refuse(folder, CorruptCheckpointError, "Git LFS pointer.*git lfs pull")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refuse(folder, CheckpointNotFoundError, f"contains no {name}")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_file_that_an_interrupted_download_left_out_is_named(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (folder / name).unlink()
    snapshot = tmp_path / "models--someone--reranker" / "snapshots" / ("0" * 40)
    shutil.copytree(folder, snapshot)
    refuse(snapshot, CheckpointNotFoundError, f"contains no {name}.*download of the model was interrupted")


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_config_that_is_not_a_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    refuse(folder, CorruptCheckpointError, r"config\.json is not")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", "wide"),
        ("num_attention_heads", 0),
        ("vocab_size", -1),
        ("num_hidden_layers", 2.5),
        ("pad_token_id", "first"),
        ("pad_token_id", 10**6),
        ("architectures", True),
        ("layer_norm_eps", "small"),
        ("layer_norm_eps", float("inf")),
    ],
)
def test_an_invalid_value_in_the_config_is_refused(folder: Path, name: str, value: object) -> None:
    edit_config(folder, **{name: value})
    refuse(folder, CorruptCheckpointError, r"config\.json is not valid")


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused(folder: Path) -> None:
    edit_config(folder, vocab_size=100)
    edit_weights(
        folder,
        lambda t: {
            n: w[:100].contiguous() if n.endswith("word_embeddings.weight") else w for n, w in t.items()
        },
    )
    refuse(folder, UnsupportedCheckpointError, "the tokenizer gives ids up to .* embeds only 100")


@pytest.mark.parametrize("padding_idx", [0, 2, 3, 100])
def test_a_padding_id_that_occurs_in_texts_is_refused(folder: Path, padding_idx: int) -> None:
    edit_config(folder, pad_token_id=padding_idx)
    refuse(
        folder, UnsupportedCheckpointError, f"pad_token_id {padding_idx} .* that texts contain", max_length=64
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**6}, "config.json requires 1000000 layers"),
        ({"hidden_size": 4 * 10**8}, "has shape .* but config.json requires"),
    ],
)
def test_enormous_sizes_in_the_config_are_refused_at_once(
    folder: Path, changes: dict[str, int], message: str
) -> None:
    edit_config(folder, **changes)
    refuse(folder, CorruptCheckpointError, message)


@pytest.mark.parametrize("name", ["a" * 300, "./" + "c" * 300, "~\0", "~\ud800", "./\ud800"])
def test_a_name_that_no_folder_can_have_is_refused(name: str) -> None:
    with pytest.raises(CheckpointNotFoundError):
        Scorer(name, local_files_only=True)


@pytest.mark.parametrize("local_files_only", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"cache_folder": "\0"},
        {"cache_folder": "\ud800"},
        {"revision": "a\0"},
        {"revision": "\udc80"},
    ],
)
def test_names_that_the_hub_library_cannot_use_are_refused(
    settings: dict[str, Any], local_files_only: bool
) -> None:
    with pytest.raises(CheckpointNotFoundError, match="not a valid name"):
        Scorer("organisation/name", local_files_only=local_files_only, **settings)


def test_a_folder_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", CheckpointNotFoundError, "does not exist")
    with pytest.raises(CheckpointNotFoundError, match="does not exist"):
        Scorer("./nowhere")
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", CheckpointNotFoundError, "is a file; pass the folder")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that fails to be read")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_file_that_cannot_be_read_is_reported(folder: Path, name: str) -> None:
    (folder / name).unlink()
    (folder / name).symlink_to("/proc/self/mem")
    refuse(folder, CheckpointError, r"^the model in .* cannot be loaded: \[Errno 5\] Input/output error")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the size of the process")
def test_a_model_that_does_not_fit_into_memory_is_reported(folder: Path) -> None:
    size = 1 << 32
    header = json.dumps({"x": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    with (folder / "model.safetensors").open("wb") as file:  # a sparse file
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    code = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from bge_rerank_integrations import CheckpointError, Scorer\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "limit = resource.getrlimit(resource.RLIMIT_AS)[1]\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 31), limit))\n"
        "try:\n"
        "    Scorer(sys.argv[1], device='cpu')\n"
        "except CheckpointError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=False
    )
    assert run.stderr == ""
    assert f"the model in {folder} cannot be loaded: " in run.stdout
    assert "Cannot allocate memory" in run.stdout


def test_an_invalid_hub_id_is_refused() -> None:
    with pytest.raises(CheckpointNotFoundError, match="nor a valid hub id"):
        Scorer("not a/valid/id")


@pytest.mark.parametrize("local_files_only", [True, False])
def test_an_unreachable_hub_is_reported_with_the_steps_to_work_offline(
    tmp_path: Path, local_files_only: bool
) -> None:
    # All tests run with HF_HUB_OFFLINE=1.
    with pytest.raises(
        HubUnreachableError,
        match=r"To work offline, download it once .*hf download BAAI/bge-reranker-base --local-dir bge-reranker-base",
    ):
        Scorer("BAAI/bge-reranker-base", cache_folder=str(tmp_path), local_files_only=local_files_only)


def test_a_revision_of_a_local_folder_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder.parent)
    for model in (folder, folder.name):  # the second could also be a hub id
        with pytest.raises(
            ConfigError, match="is a local folder, which has no revisions; leave revision out"
        ):
            Scorer(model, device="cpu", dtype="float32", revision="main")


# --- settings of sentence-transformers for a model's inputs ----------------------------------------------------

TRANSFORMER = "sentence_transformers.base.modules.transformer.Transformer"


def save_as_sentence_transformers_does(
    folder: Path, *, modules: Any = (TRANSFORMER,), input_settings: Any = None, **settings: Any
) -> None:
    """Write the files that `CrossEncoder.save_pretrained` of sentence-transformers 6 adds to a model."""
    (folder / "config_sentence_transformers.json").write_text(
        json.dumps(
            {
                "__version__": {
                    "pytorch": "2.13.0",
                    "sentence_transformers": "6.2.0",
                    "transformers": "5.0.0",
                },
                "activation_fn": "torch.nn.modules.linear.Identity",
                "default_prompt_name": None,
                "model_type": "CrossEncoder",
                "prompts": {},
                **settings,
            }
        )
    )
    (folder / "modules.json").write_text(
        json.dumps([{"idx": i, "name": str(i), "path": "", "type": name} for i, name in enumerate(modules)])
    )
    (folder / "sentence_bert_config.json").write_text(
        json.dumps(
            {
                "transformer_task": "sequence-classification",
                "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
                "module_output_name": "scores",
                **(input_settings or {}),
            }
        )
    )


PROMPTS = {"search": "Find what answers this: ", "none": None, "empty": ""}


def test_the_default_prompt_of_a_checkpoint_is_put_before_the_query(folder: Path, scorer: Scorer) -> None:
    """As in `Transformer.preprocess` of sentence-transformers: unchanged, before the first text of the pair."""
    save_as_sentence_transformers_does(folder, prompts=PROMPTS, default_prompt_name="search")
    prompted = [(PROMPTS["search"] + query, passage) for query, passage in PAIRS]  # type: ignore[operator]
    with Scorer(folder, device="cpu", dtype="float32") as here:
        assert here.score(PAIRS) == pytest.approx(scorer.score(prompted), abs=1e-5)
        assert here.score(PAIRS) != pytest.approx(scorer.score(PAIRS), abs=1e-3)
        (best,) = here.rank(PAIRS[0][0], [PAIRS[0][1]])
        assert best.score == pytest.approx(scorer.score(prompted[:1])[0], abs=1e-5)
    with Scorer(folder, device="cpu", dtype="float32", query_instruction="") as plain:
        assert plain.score(PAIRS) == pytest.approx(scorer.score(PAIRS), abs=1e-5)
    with Scorer(folder, device="cpu", dtype="float32", query_instruction="Q: ") as own:
        expected = scorer.score([("Q: " + query, passage) for query, passage in PAIRS])
        assert own.score(PAIRS) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"prompts": PROMPTS},
        {"prompts": PROMPTS, "default_prompt_name": "none"},
        {"prompts": PROMPTS, "default_prompt_name": "empty"},
        {"prompts": PROMPTS, "default_prompt_name": "search", "model_type": "SentenceTransformer"},
        {"input_settings": {"processing_kwargs": {"text": {"max_length": 128, "truncation": True}}}},
    ],
    ids=str,
)
def test_without_a_default_prompt_the_scores_do_not_change(
    folder: Path, scorer: Scorer, settings: dict[str, Any]
) -> None:
    save_as_sentence_transformers_does(folder, **settings)
    with Scorer(folder, device="cpu", dtype="float32") as here:
        assert here.score(PAIRS) == scorer.score(PAIRS)


def test_prompts_are_ignored_without_modules_json(folder: Path, scorer: Scorer) -> None:
    save_as_sentence_transformers_does(folder, prompts=PROMPTS, default_prompt_name="search")
    (folder / "modules.json").unlink()
    with Scorer(folder, device="cpu", dtype="float32") as here:
        assert here.score(PAIRS) == scorer.score(PAIRS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modules": [TRANSFORMER, "sentence_transformers.base.modules.dense.Dense"]}, r"modules .*'Dense'"),
        ({"input_settings": {"transformer_task": "feature-extraction"}}, "transformer_task"),
        ({"input_settings": {"do_lower_case": True}}, "do_lower_case.*Lowercase"),
        (
            {"input_settings": {"modality_config": {"message": {}, "text": {}}}},
            "chat template.*query_instruction=.*passage_instruction=",
        ),
        (
            {"input_settings": {"processing_kwargs": {"text": {"add_special_tokens": False}}}},
            "processing_kwargs .*add_special_tokens",
        ),
    ],
    ids=str,
)
def test_unsupported_input_settings_are_refused(folder: Path, settings: dict[str, Any], message: str) -> None:
    save_as_sentence_transformers_does(folder, **settings)
    refuse(folder, UnsupportedCheckpointError, f"saved by sentence-transformers with.*{message}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config_sentence_transformers.json", "[]"),
        ("config_sentence_transformers.json", "{"),
        ("modules.json", "{"),
        ("modules.json", '["Transformer"]'),
        ("sentence_bert_config.json", "3"),
    ],
)
def test_damaged_settings_of_sentence_transformers_are_refused(folder: Path, name: str, content: str) -> None:
    save_as_sentence_transformers_does(folder)
    (folder / name).write_text(content)
    refuse(folder, CorruptCheckpointError, "download it again")


@pytest.mark.parametrize("prompts", [{}, {"search": 3}, None, []])
@pytest.mark.parametrize("name", ["search", ["search"]])
def test_an_undefined_default_prompt_is_refused(folder: Path, prompts: Any, name: Any) -> None:
    save_as_sentence_transformers_does(folder, prompts=prompts, default_prompt_name=name)
    refuse(folder, CorruptCheckpointError, "defines no prompt for its default_prompt_name .*search")


def test_a_prompt_changes_the_fingerprint(folder: Path) -> None:
    from bge_rerank_integrations.engine.checkpoint.files import fingerprint

    before = fingerprint(folder)
    save_as_sentence_transformers_does(folder, prompts=PROMPTS, default_prompt_name="search")
    assert fingerprint(folder) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_change_of_a_file_changes_the_fingerprint(folder: Path, name: str) -> None:
    from bge_rerank_integrations.engine.checkpoint.files import fingerprint

    # Longer than the first and the last megabyte, which are read of the weights.
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (5 << 12))
    original = (folder / name).read_bytes()
    found = [fingerprint(folder)]
    for changed in (
        original[: 1 << 20] + original,  # of zeros, only the size would differ
        b"x" + original[1:],
        original[:-1] + b"x",
        original + b"x",
        original[:-1],
    ):
        (folder / name).write_bytes(changed)
        found.append(fingerprint(folder))
    (folder / name).write_bytes(original)
    assert fingerprint(folder) == found[0]
    assert len(set(found)) == 6


def test_a_config_of_an_older_release_of_transformers(folder: Path, scorer: Scorer) -> None:
    """The published configs of the BGE rerankers have these keys."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for name in ("add_cross_attention", "dtype", "is_decoder", "tie_word_embeddings"):
        config.pop(name, None)
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    older = {"output_past": True, "position_embedding_type": "absolute", "torch_dtype": "float32"}
    path.write_text(json.dumps({**config, **labels, **older, "transformers_version": "4.28.1"}))
    with Scorer(folder, device="cpu", dtype="float32") as other:
        assert other.score(PAIRS) == scorer.score(PAIRS)


def test_a_cached_hub_model_loads_offline(checkpoint: Path, tmp_path: Path, scorer: Scorer) -> None:
    repository = tmp_path / "models--someone--reranker"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(checkpoint, repository / "snapshots" / ("0" * 40))
    with Scorer(
        "someone/reranker", cache_folder=str(tmp_path), local_files_only=True, device="cpu", dtype="float32"
    ) as cached:
        assert cached.score(PAIRS) == scorer.score(PAIRS)


def shard(folder: Path) -> dict[str, str]:
    """Split the weights into two files with an index, as in large checkpoints."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), start=1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({n: tensors[n].contiguous() for n in names}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_sharded_weights_give_the_same_scores(folder: Path, scorer: Scorer) -> None:
    shard(folder)
    with Scorer(folder, device="cpu", dtype="float32") as sharded:
        assert sharded.score(PAIRS) == scorer.score(PAIRS)


@pytest.mark.parametrize("sharded", [False, True])
def test_sha256_refuses_changed_weights(folder: Path, scorer: Scorer, sharded: bool) -> None:
    if sharded:
        shard(folder)
    contents = b"".join(path.read_bytes() for path in sorted(folder.glob("model*.safetensors")))
    sha256 = hashlib.sha256(contents).hexdigest()
    with Scorer(folder, device="cpu", dtype="float32", sha256=sha256) as pinned:
        assert pinned.score(PAIRS) == scorer.score(PAIRS)
    path = max(folder.glob("model*.safetensors"))
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1  # the last bit of a weight, which no other check would detect
    path.write_bytes(changed)
    refuse(folder, CorruptCheckpointError, "which is not the expected one", sha256=sha256)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refuse(folder, CheckpointNotFoundError, "contains no model-00002-of-00002")


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": ["model-00001-of-00002.safetensors"]}]
)
def test_an_index_without_files_is_refused(folder: Path, index: Any) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, CorruptCheckpointError, "names no weight files; download it again")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 3])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(folder: Path, name: Any) -> None:
    weight_map = shard(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(weight_map, name)}))
    refuse(folder, CorruptCheckpointError, "names a weight file outside its folder")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_stored_in_another_precision_give_the_same_scores(folder: Path, dtype: torch.dtype) -> None:
    rounded = {torch.float16: torch.float16, torch.bfloat16: torch.bfloat16}.get(dtype, torch.float32)
    edit_weights(folder, lambda t: {n: w.to(rounded).float() for n, w in t.items()})
    with Scorer(folder, device="cpu", dtype="float32") as wide:
        expected = wide.score(PAIRS)
    edit_weights(folder, lambda t: {n: w.to(dtype) for n, w in t.items()})
    with Scorer(folder, device="cpu", dtype="float32") as stored:
        assert stored.score(PAIRS) == expected


def test_unused_tensors_are_allowed(folder: Path, scorer: Scorer) -> None:
    unused = {
        "roberta.embeddings.position_ids": torch.arange(514)[None],
        "roberta.embeddings.token_type_ids": torch.zeros(1, 514, dtype=torch.int64),
        "roberta.pooler.dense.weight": torch.zeros(64, 64),
        "roberta.pooler.dense.bias": torch.zeros(64),
    }
    edit_weights(folder, lambda tensors: tensors | unused)
    with Scorer(folder, device="cpu", dtype="float32") as other:
        assert other.score(PAIRS) == scorer.score(PAIRS)


def test_loaded_weights_do_not_change_with_their_file(folder: Path, scorer: Scorer) -> None:
    with Scorer(folder, device="cpu", dtype="float32") as loaded:
        path = folder / "model.safetensors"
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"\xff" * 1000)
        assert loaded.score(PAIRS) == scorer.score(PAIRS)


def test_old_names_of_norm_parameters_are_read(folder: Path, scorer: Scorer) -> None:
    def rename(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    edit_weights(folder, lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})
    with Scorer(folder, device="cpu", dtype="float32") as renamed:
        assert renamed.score([("a", "b")]) == pytest.approx(scorer.score([("a", "b")]), abs=1e-6)


def test_a_checkpoint_saved_by_transformers_gives_the_same_scores(
    checkpoint: Path, tmp_path: Path, scorer: Scorer
) -> None:
    from transformers import XLMRobertaForSequenceClassification

    XLMRobertaForSequenceClassification.from_pretrained(checkpoint).save_pretrained(tmp_path)
    shutil.copy(checkpoint / "tokenizer.json", tmp_path)
    with Scorer(tmp_path, device="cpu", dtype="float32") as saved:
        assert saved.score(PAIRS) == scorer.score(PAIRS)


def test_max_length_beyond_the_positions_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="max_length 513 is more than the 512 tokens"):
        Scorer(folder, max_length=513)


def test_an_unavailable_device_is_refused(folder: Path) -> None:
    missing = "cuda:99"
    with pytest.raises(DeviceError, match="cuda:99' is not available"):
        Scorer(folder, device=missing)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.skipif(torch.backends.mps.is_available(), reason="needs a machine without MPS")
def test_float16_is_refused_where_auto_selects_the_cpu(folder: Path) -> None:
    with pytest.raises(ConfigError, match="not supported on a CPU"):
        Scorer(folder, dtype="float16")


def quantized(tensors: Tensors) -> Tensors:
    """Store every matrix of the encoder as int8 with a scale for each row."""
    stored: Tensors = {}
    for name, tensor in tensors.items():
        if tensor.ndim == 2 and not name.startswith("classifier."):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            stored[name], stored[f"{name}_scale"] = (tensor / scale).round().to(torch.int8), scale
        else:
            stored[name] = tensor
    return stored


def test_weights_stored_as_int8_by_row_score_as_their_products_with_the_scales(folder: Path) -> None:
    def multiplied_out(tensors: Tensors) -> Tensors:
        stored = quantized(tensors)
        return {
            name: stored[name].float() * stored[f"{name}_scale"]
            if f"{name}_scale" in stored
            else stored[name]
            for name in tensors
        }

    packed = Path(shutil.copytree(folder, folder.with_name("packed")))
    edit_weights(folder, multiplied_out)
    edit_weights(packed, quantized)
    assert (packed / "model.safetensors").stat().st_size < 0.5 * (folder / "model.safetensors").stat().st_size
    with (
        Scorer(folder, device="cpu", dtype="float32") as plain,
        Scorer(packed, device="cpu", dtype="float32") as scorer,
    ):
        assert scorer.score(PAIRS) == plain.score(PAIRS)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("output.dense.weight_scale", None, UnsupportedCheckpointError, "stored as I8"),
        ("output.dense.weight_scale", lambda t: t[:-1], CorruptCheckpointError, "has shape"),
        ("output.dense.weight_scale", lambda t: t.squeeze(1), CorruptCheckpointError, "has shape"),
        ("output.dense.weight_scale", lambda t: t.to(torch.int8), UnsupportedCheckpointError, "stored as I8"),
        ("output.dense.weight_scale", lambda t: t * float("nan"), CorruptCheckpointError, "NaN"),
        ("output.dense.weight", lambda t: t.to(torch.uint8), CorruptCheckpointError, "do not belong"),
    ],
)
def test_int8_weights_with_a_wrong_scale_are_refused(
    folder: Path,
    name: str,
    change: Callable[[torch.Tensor], torch.Tensor] | None,
    error: type[CheckpointError],
    message: str,
) -> None:
    def edit(tensors: Tensors) -> Tensors:
        stored = quantized(tensors)
        full_name = f"roberta.encoder.layer.1.{name}"
        tensor = stored.pop(full_name)
        return stored if change is None else {**stored, full_name: change(tensor).contiguous()}

    edit_weights(folder, edit)
    refuse(folder, error, message)
