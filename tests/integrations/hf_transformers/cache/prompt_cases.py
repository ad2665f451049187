"""A system prompt and questions behind it."""

from tests.integrations.tiny_models import tokens

PAGE = 16
FORMS = ["none", "int8", "int4", "k8v4"]
SYSTEM, QUESTIONS = tokens(1, 5 * PAGE + 3), [tokens(1, n) + n for n in (7, 40)]
