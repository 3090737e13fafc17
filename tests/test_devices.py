from __future__ import annotations

import logging

import pytest
import torch

from mu import devices
from mu.devices import DeviceError, check_devices, resolve_devices


@pytest.fixture(autouse=True)
def fresh_notice():
    devices._say_cpu.cache_clear()


def test_cpu_is_cpu():
    assert resolve_devices("cpu") == "cpu"


def test_without_cuda_it_is_the_cpu_and_said_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING, logger="mu"):
        assert [resolve_devices("0"), resolve_devices("0")] == ["cpu", "cpu"]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "running on the CPU" in caplog.text


def test_with_cuda_the_number_is_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_devices("0") == "cuda:0"
    assert resolve_devices("cuda:1") == "cuda:1"
    with pytest.raises(DeviceError, match="no CUDA device 2; this machine has devices 0 to 1"):
        resolve_devices("2")


def test_every_device_that_is_named_has_to_be_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_devices("0")
    check_devices("cpu,cpu")
    with pytest.raises(DeviceError, match="no CUDA device 1; this machine has device 0"):
        check_devices("0,1")
