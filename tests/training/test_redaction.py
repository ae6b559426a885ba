"""Redaction: no secret is logged, by its key or by its shape, and nothing that only looks odd is hidden."""

import pytest
from running import METHODS
from yaml import safe_load

from adamerge.training.redaction import redacted, redacted_words

HEX = "0123456789abcdef"

SECRETS = {  # settings, and the part of them that nobody may see
    "a key by its name": ({"api_key": "canary-01"}, "canary-01"),
    "a token by its name": ({"hub_token": "canary-02"}, "canary-02"),
    "a password by its name": ({"PASSWORD": "canary-03"}, "canary-03"),
    "a secret by its name": ({"model": {"init_args": {"clientSecret": "canary-04"}}}, "canary-04"),
    "a credential by its name": ({"aws_credential": "canary-05"}, "canary-05"),
    "a token of the hub": ({"base": "hf_" + "canaryABCDEFGHIJ" * 2}, "canaryABCDEFGHIJ"),
    "a key of wandb": ({"note": f"see {(HEX * 3)[:40]}"}, HEX),
    "a key of an API": ({"endpoint": "sk-canary0123456789ABCDEF"}, "canary0123456789"),
    "a user in a URL": ({"cache": "https://canary-09@host/path"}, "canary-09"),
    "a password in a URL": ({"proxy": "http://me:canary-10@host:8080/"}, "canary-10"),
    "in a list in a list": ({"experts": [["fine", ["hf_canary00000011"]], {"x": ["y"]}]}, "canary00000011"),
    "in a tuple, inside a text": ({"words": ("--url=s3://me:canary-12@host/a, then on",)}, "canary-12"),
    "a list of tokens by its name": ({"tokens": ["canary-13"]}, "canary-13"),
    "credentials of several parts": ({"credentials": {"user": "me", "value": "canary-14"}}, "canary-14"),
    "a key of an API, of today": ({"endpoint": "sk-proj-canary15_ABCDEFGHIJKL"}, "canary15"),
    "a key of wandb, of today": ({"note": "wandb_v1_canary16ABCDEF_0123456789"}, "canary16"),
    "a token of GitLab": ({"dataset": "glpat-canary17-ABCDEFGHIJKLM"}, "canary17"),
    "a token of GitLab, short": ({"dataset": "glpat-canary17"}, "canary17"),
    "a token of GitHub": ({"dataset": "ghp_" + "canary18ABCD" * 3}, "canary18"),
    "a token of Slack": ({"hook": "xoxb-123456789012-canary19abcdef"}, "canary19"),
    "a header": ({"header": "Bearer canary20"}, "canary20"),
    "a header by its name": ({"headers": ["Authorization: Basic canary21"]}, "canary21"),
    "a token in a URL": ({"dataset": "https://host/data?x=1&token=canary22&y=2"}, "canary22"),
    "a signature in a URL": ({"dataset": "https://host/data?sv=1&sig=canary23%3D"}, "canary23"),
    "auth": ({"auth": "canary24"}, "canary24"),
    "pwd": ({"db": {"pwd": "canary25"}}, "canary25"),
    "a number for a password": ({"password": 12345626}, "12345626"),
    "an assignment inside a text": ({"note": "HF_TOKEN=canary27 python"}, "canary27"),
    "JSON inside a text": ({"note": '{"a": 1, "api_key": "canary28"}'}, "canary28"),
    "a key of Amazon": ({"note": "AKIACANARY2900000000"}, "CANARY29"),
    "a web token": ({"note": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJjYW5hcnkzMCJ9.canary30"}, "eyJzdWIiOiJjYW5hcnkzMCJ9"),
    "a private key": ({"note": "-----BEGIN RSA PRIVATE KEY-----\ncanary31\n"}, "canary31"),
    "a key of Stripe": ({"note": "sk_live_canary32ABCDEFGHIJKLMNOP"}, "canary32"),
}


@pytest.mark.parametrize("name", SECRETS)
def test_a_secret_is_not_logged(name):
    settings, canary = SECRETS[name]
    assert canary in str(settings)
    found = redacted(settings)
    assert canary not in str(found) and "…" in str(found)
    assert found.keys() == settings.keys(), "what is set is told, though not to what"
    assert canary in str(settings), "the settings themselves are still needed"


def test_what_stands_beside_a_secret_is_kept():
    settings = {"url": "https://me:pw@host/path", "token": "x", "lr": 0.01, "experts": ["hf_abcdefghijkl", "cars"]}
    found = redacted(settings)
    assert found == {"url": "https://…host/path", "token": "…", "lr": 0.01, "experts": ["…", "cars"]}


ORDINARY = {
    "a task": "cars",
    "a path": "/data/models/vit-b-32/cars/model.safetensors",
    "a path at home": "~/models/dtd.safetensors",
    "a hub id": "laion/CLIP-ViT-B-32-laion2B-s34B-b79K",
    "a URL": "https://host.example/path/file?x=1",
    "a fingerprint": HEX * 4,
    "a short hash": "d22343b",
    "patterns": ["visual.*", "*.token_embedding.weight", "*.k_proj.bias"],
    "numbers": [1, 0.3, 1e-3, True, None, -1],
    "nothing": {},
    "a class": {"class_path": "adamerge.parametrizations.LayerWise", "init_args": {"init": 0.3}},
    "templates": ["a photo of {}.", "the {} sign"],
    "a method": "configs/methods/task-arithmetic.yaml",
    "a tokenizer": {"tokenizer": "openai/clip-vit-base-patch32"},
    "a folder of the hub's": "/scratch/hf_datasets_cache/cars",
    "a disk": "/mnt/disk-evaluations/runs",
    "a revision on the Hub": f"org/model@{(HEX * 3)[:40]}",
    "a revision in the Hub's cache": f"/hub/models--org--m/snapshots/{(HEX * 3)[:40]}/model.safetensors",
    "a revision by its name": {"revision": (HEX * 3)[:40]},
    "fingerprints by their names": {"base": HEX * 4, "experts": {"cars": HEX[::-1] * 4}},
    "a number of tokens": {"max_tokens": 128, "new_tokens": "64"},
    "special tokens": {"pad_token": "<pad>", "eos_token": "<|im_end|>", "mask_token": "[MASK]", "image_token": 32000},
    "a flag": {"add_bos_token": True},
    "a template of keys": ["a photo of the key: {}", "a photo of a {} = key", "a ring bearer standing"],
    "an address": "http://127.0.0.1:8080/data?split=test&page=2",
    "word vectors": "glove-wiki-gigaword-300",
    "tensors": "model.layers.0.self_attn.k_proj.weight",
    "a template of chats": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% endfor %}",
    "an assignment": "--model.search.lr=0.1 --trainer.max_steps=3",
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_values_are_logged_as_they_are(name):
    assert redacted({"value": ORDINARY[name]}) == {"value": ORDINARY[name]}


def test_the_shipped_configurations_hold_nothing_that_looks_like_a_secret():
    for path in METHODS.parent.rglob("*.yaml"):
        settings = safe_load(path.read_text(encoding="utf-8"))
        assert redacted(settings) == settings, path


def test_a_command_line_shows_no_secret_either():
    words = [
        *(
            "fit",
            "--config",
            "pools/a.yaml",
            "--data.token",
            "canary-1",
            "--data.auth=canary-2",
            "--model.search.lr=0.1",
        ),
        *("--trainer.logger.save_dir", "s3://me:canary-3@host/a", '--data.tasks={"a": {"api_key": "canary-4"}}'),
        *("--resume", "runs/a/seed0", "--hub_token", "--flag", f"--id={HEX[:8]}"),
    ]
    assert redacted_words(words) == [
        *("fit", "--config", "pools/a.yaml", "--data.token", "…", "--data.auth=…", "--model.search.lr=0.1"),
        *("--trainer.logger.save_dir", "s3://…host/a", '--data.tasks={"a": {"api_key": "…"}}'),
        *("--resume", "runs/a/seed0", "--hub_token", "--flag", f"--id={HEX[:8]}"),
    ]
