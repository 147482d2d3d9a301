"""The same classifier behind other servers, one module each: what a good developer writes with that framework.

Each is run as ``python -m benchmarks.peer_apps.NAME`` by the interpreter that has the framework, listens on 127.0.0.1,
and answers ``POST /classify``, the body being an encoded image, with ``Classifier.answer``.
"""
