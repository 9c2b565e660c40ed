"""What is taken for a secret, and what is not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from workloads import secret_values
from workloads.secret_values import MASK, is_secret, know, masked, without_secrets

PEM = "\n".join(
    [
        "-----BEGIN OPENSSH " + "PRIVATE KEY-----",
        *("b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAE", "q83vEjRWeJA="),
        "-----END OPENSSH PRIVATE KEY-----\n",
    ]
)
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N"
BY_SHAPE = {  # put together here, so that no scanner takes this file for a leak
    "hugging face": "hf_" + "QmZxKcPlWsDvBnTyRhJuGeAoIfLbNqXsKd",
    "github": "ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a",
    "github fine": "github_pat_" + "11ABCDEFG0a1b2c3d4e5f6_g7h8i9j0k1l2",
    "openai": "sk-" + "proj-aB3dE5fG7hI9jK1lM3nO5pQ7",
    "anthropic": "sk-" + "ant-api03-aB3dE5fG7hI9jK1l-M3nO5pQ7",
    "stripe": "sk_" + "live_4eC39HqLyjWDarjtT1zdp7dc",
    "aws": "AKIA" + "IOSFODNN7EXAMPLE",
    "slack": "xoxb-" + "123456789012-abcdefGHIJKL",
    "slack hook": "https://hooks.slack.com/services/" + "T00000000/B00000000/XXXXXXXXXXXXXXXX",
    "gitlab": "glpat-" + "a1B2c3D4e5F6g7H8i9J0",
    "google": "AIza" + "SyA1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q",
    "npm": "npm_" + "aB3dE5fG7hI9jK1lM3nO5pQ7rS9tU1vW3xY5",
    "pypi": "pypi-" + "AgEIcHlwaS5vcmcCJGE1b2c3d4e5f6",
    "nvidia": "nvapi-" + "a1B2c3D4e5F6g7H8i9J0k1L2",
    "sendgrid": "SG." + "a1B2c3D4e5F6g7H8i9J0k1" + ".L2m3N4o5P6q7R8s9T0u1V2",
    "jwt": JWT,
    "pem": PEM,
    "url": "postgresql://me:" + "hunter2hunter@db.site/x",
    "azure": "AccountName=x;AccountKey=" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4==;",
    "bearer": "Authorization: Bearer " + "a1B2c3D4e5F6g7H8i9J0",
}
BY_NAME = [
    *(
        "HF_TOKEN",
        "WANDB_API_KEY",
        "DB_PASSWORD",
        "MYSQL_PWD",
        "AWS_SECRET_ACCESS_KEY",
        "SSH_PRIVATE_KEY",
        "MYPASSWORD",
    ),
    *("CLIENT_SECRET", "clientSecret", "apiKey", "hub.token", "hub_token", "--api-key", "GITHUB_TOKEN_2", "passwd"),
    *(
        "GOOGLE_CREDENTIALS",
        "data.auth_token",
        "accessToken",
        "APIKEY",
        "passphrase",
        "--pass",
        "X_PASS",
        "pw",
        "TOKEN",
        "SECRET_KEY",
    ),
]
HARMLESS = [
    *(("TOKENIZERS_PARALLELISM", "false"), ("max_tokens", "4096"), ("key_dim", "64"), ("KEYBOARD", "us-intl-2024x")),
    *(("data.tokenizer", "meta-llama/Llama-2-7b-hf"), ("tokens_per_second", "5000.5"), ("pad_token", "<pad>")),
    *(("eos_token", "</s>"), ("token_dim", "512"), ("bos_token_id", "1"), ("AUTHOR", "Ada Lovelace 1815")),
    *(("sort_key", "created_at"), ("label_key", "label"), ("SSH_AUTH_SOCK", "/tmp/ssh-XyZ123/agent.42")),
    *(("PWD", "/home/me/a1B2c3D4"), ("HF_TOKEN_PATH", "/home/me/.hf/token"), ("auth", "munge"), ("seed", "1234567890")),
    *(("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json"), ("password_file", "/run/secrets/db")),
    *(("url", "https://site.org/a:b@c"), ("model", "sk-learn-like-model-of-mine"), ("name", "hf_hub_download_cached")),
    *(("use_token", "true"), ("HF_TOKEN", ""), ("commit", "8ddafb32d91f8c911552162e3bf8ff14b631789a")),
    *(("path", "runs/20261122-131640-tp_fsdp-2011"), ("token", "${HF_TOKEN}"), ("text", "token: str = tokenizer(x)")),
    *(("note", "the secret of a good basic understanding is practice"), ("monkey", "a1B2c3D4e5F6g7H8i9J0")),
    *(("NCCL_SOCKET_IFNAME", "eth0"), ("cache_key", "v2"), ("url", "http://host:29500/x"), ("image_token", "<image>")),
    *(("code", "api_key = os.environ['API_KEY']"), ("code", "password=password, token=self.token"), ("lr", "3e-4")),
]


@pytest.fixture(autouse=True)
def _knows_nothing() -> Iterator[None]:
    secret_values.forget()
    yield
    secret_values.forget()


@pytest.mark.parametrize("kind", BY_SHAPE)
def test_a_shape_is_masked_whatever_its_name_is(kind: str) -> None:
    secret = BY_SHAPE[kind]
    core = {"url": "hunter2hunter", "azure": "a1B2c3D4e5F6g7H8i9J0k1L2m3N4==", "bearer": "a1B2c3D4e5F6g7H8i9J0"}.get(
        kind, secret.strip().removeprefix("https://hooks.slack.com/services/")
    )
    for text in (secret, f"it was {secret} then", f"x={secret}", f'{{"a": "{secret}"}}'):
        shown = masked("note", text)
        assert core not in shown
        assert MASK in shown
        assert core not in without_secrets(text)


@pytest.mark.parametrize("name", BY_NAME)
def test_a_name_is_enough(name: str) -> None:
    assert masked(name, "hunter2") == MASK
    assert masked("", f"{name}=hunter2") == f"{name}={MASK}"
    assert masked("", f'"{name}": "hunter2"') == f'"{name}": "{MASK}"'


@pytest.mark.parametrize(("name", "value"), HARMLESS)
def test_what_is_harmless_stays(name: str, value: str) -> None:
    assert masked(name, value) == value
    assert not is_secret(name, value)
    assert without_secrets(f"{name}={value}") == f"{name}={value}"


def test_a_url_keeps_all_but_its_password() -> None:
    assert masked("url", BY_SHAPE["url"]) == f"postgresql://me:{MASK}@db.site/x"


def test_known_values_are_found_in_every_spelling() -> None:
    know(['pa"ss\\wörd', PEM, "short"])
    assert without_secrets("it is 'pa\"ss\\wörd'") == f"it is '{MASK}'"
    assert without_secrets('{"a": "pa\\"ss\\\\w\\u00f6rd"}') == f'{{"a": "{MASK}"}}'
    assert "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAE" not in without_secrets(PEM.replace("\n", "\n> "))
    assert without_secrets("short") == "short"
    know(["hunter2"])
    assert without_secrets("hunter2 hunter22 xhunter2 (hunter2)") == f"{MASK} hunter22 xhunter2 ({MASK})"


def test_a_long_text_takes_little_time() -> None:
    text = "10:00:00 [rank 3/8 node 0] INFO: step 12 loss 3.14 https://site.org/a?b=c key=value: 'x' " * 2000
    assert masked("", text) == text
    assert without_secrets("a" * 200_000) == "a" * 200_000
    assert masked("", "a" * 200_000 + "=:" * 20_000) != ""
