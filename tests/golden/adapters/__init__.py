# SPDX-License-Identifier: Apache-2.0
"""Adapters from golden cases to our code, one explicit ``ADAPTERS`` table per module.

A module in this folder defines ``ADAPTERS = {"<method>/<case>": function}``. A function takes
``(meta, arrays)`` (see :mod:`tests.golden.harness`) and returns ``{output name: tensor or array}``
with at least every expected output of the case. It builds our module from the case's own
settings, passes the weights through our converter, and hard-codes nothing about one file.
"""
