"""Compiling is a gain in speed, never a condition."""

import torch

from minprefix.core import compiled as module


def double(x):
    return 2 * x


def test_where_compiling_fails_the_function_itself_is_used_and_that_is_said_once(monkeypatch, capsys):
    def broken(function, dynamic):
        def fail(*args):
            raise RuntimeError("no C++\ncompiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    function = module.compiled.__wrapped__(double)
    large = torch.ones(module.WORTH_IT)
    assert torch.equal(function(large), 2 * large) and torch.equal(function(large), 2 * large)
    assert capsys.readouterr().err == "torch.compile does not work here, so training is slower (no C++ compiler)\n"


def test_small_tensors_are_not_worth_it(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: None)
    assert torch.equal(module.compiled.__wrapped__(double)(torch.ones(3)), 2 * torch.ones(3))
