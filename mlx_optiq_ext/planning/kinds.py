"""Kinds of text that a model is asked to write where there is no calibration file.

Every beginning is a short phrase of this project's own.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One kind of text.

    Attributes:
        name: Its name.
        beginnings: What its documents begin with. An empty one leaves all to the model: the whole
            document, or the user's turns too.
        temperature: Of the draws.
        surprises: Share of tokens that are drawn blindly instead.
        chat: Whether the beginnings are a user's turns, for the tokenizer's chat template.
    """

    name: str
    beginnings: tuple[str, ...]
    temperature: float = 1.0
    surprises: float = 0.0
    chat: bool = False


REQUESTS = (
    "Why is the sky blue? Explain it to a child.",
    "Write a Python function that removes duplicates from a list and keeps the order.",
    "A baker sells 14 loaves at $3 each and 9 cakes at $12 each. How much money is that?",
    "Summarize the causes of the French Revolution in five sentences.",
    "Give me a list of ten things to pack for a week in the mountains.",
    "Translate into German: The train to Hamburg leaves at half past seven.",
    "Write a short story about a lighthouse keeper who finds a letter.",
    "What is the difference between a process and a thread?",
    "Tom is twice as old as Ann. In six years their ages add up to 42. How old are they now?",
    "Write an e-mail to my landlord about a broken heater.",
    "Compare electric cars with petrol cars in a table.",
    "Find the mistake in this sentence and correct it: She don't likes apples.",
    "How do I reverse a linked list in C? Show the code.",
    "What should I cook with rice, eggs and spinach?",
    "Write a poem of two verses about autumn rain.",
    "A tank holds 240 litres and loses 5% a day. How much is left after 3 days? Show each step.",
    "Who was Marie Curie, and what is she known for?",
    "Give the capital cities of Peru, Kenya and Norway as JSON.",
    "Rewrite this politely: Send me the report now.",
    "Is it safe to drink sea water? Give reasons.",
    "Explique en français comment fonctionne un moteur à vapeur.",
    "Escribe en español una receta sencilla de sopa de tomate.",
    "Erkläre auf Deutsch, warum es Jahreszeiten gibt.",
    "Scrivi in italiano una breve storia su un pescatore.",
    "Escreva em português três conselhos para dormir melhor.",
    "Расскажи по-русски, как образуются облака.",
    "请用中文介绍一下长城的历史。",
    "日本語で自己紹介を書いてください。",
    "한국어로 건강한 아침 식사를 추천해 주세요.",
    "اكتب بالعربية فقرة قصيرة عن البحر.",
    "हिंदी में बताइए कि वर्षा कैसे होती है।",
)

CODE = (
    "import os\nimport sys\n\n\ndef",
    '"""Reads settings from a file."""\n\nfrom pathlib import Path\n',
    "class Queue:\n    def __init__(self, size):\n",
    "def parse(self, line):\n    # Skip what is empty.\n    if not line:\n",
    "from collections import namedtuple\n\n__all__ = [",
    "    try:\n        value = int(text)\n    except ValueError as error:\n",
    "#include <stdio.h>\n#include <stdlib.h>\n\nint main(int argc, char **argv) {\n",
    "function render(items) {\n  const",
    "public class Account {\n    private",
    "#!/bin/sh\nset -e\n\nfor file in",
    "use std::collections::HashMap;\n\nfn main() {\n",
    "SELECT name, COUNT(*) FROM orders\n",
)

PROSE = (
    "It was late in the evening when",
    "She had never liked the house at the end of the lane,",
    "My grandfather used to say that",
    "The captain put down his glass and looked at",
    "On the morning of the third day,",
    '"You cannot be serious," said',
    "Nobody in the village remembered",
    "The rain had stopped, and",
    "Anna: Did you hear what happened at the market?\nBen:",
    "INTERVIEWER: How did you begin to paint?\n\nARTIST:",
    "Customer: My order has not arrived.\nAgent:",
    "Dear Mr Hall,\n\nthank you for your letter of",
    "Subject: Meeting on Thursday\n\nHi all,\n\n",
)

REFERENCE = (
    "# Volcano\n\nA volcano is",
    "The River Severn is",
    "History of the town\n\nThe first settlers",
    "He was born in 1874 in",
    "The second season of the series",
    "The battle began when",
    "The species was first described by",
    "The song was released in",
    "The bridge, built between 1901 and 1907,",
    "In mathematics, a prime number",
    "Theorem 1. Let f be a continuous function on [0, 1]. Then",
    "Abstract. We study",
)

FORMS = (
    "Ten ways to save water at home\n\n1.",
    "Ingredients:\n- 2 cups of flour\n-",
    "To do:\n* call the plumber\n*",
    "How to change a tyre\n\nStep 1:",
    "## Frequently asked questions\n\n### How",
    '{"name": "Lena", "age": 34, "languages": [',
    "| Year | Population |\n|------|------------|\n| 1950 |",
    "date,city,temperature\n2021-03-01,Oslo,",
    "<html>\n<head>\n<title>",
    "version: 2\nservices:\n  web:\n   ",
    '<book id="12">\n  <title>',
    "Question: A farmer has 36 hens and buys a dozen more. How many hens are there?\nAnswer:",
    "Problem: Find all x with x^2 - 5x + 6 = 0.\nSolution:",
    "Q: Which planet is the largest?\nA:",
    "Exercise 4. Maria reads 18 pages a day.",
)

LANGUAGES = (
    "Le marché ouvre à huit heures, et",
    "Hace muchos años, en un pueblo pequeño,",
    "Die Stadt liegt an einem Fluss und",
    "La mattina dopo, il medico",
    "No fim do verão, a família",
    "De trein naar Utrecht vertrok",
    "Zimą dzieci z naszej ulicy",
    "Köyün dışında yaşlı bir adam",  # noqa: RUF001
    "Весной река выходит из берегов, и",
    "春天来了，公园里的花",  # noqa: RUF001
    "昔々、ある山のふもとに",
    "오늘 아침에 나는 시장에서",
    "في صباح اليوم التالي ذهب",
    "गाँव के पास एक पुरानी नदी",
)

#: Share of tokens drawn blindly, in half of the kinds.
SURPRISES = 0.125

#: A sequence goes from a kind to the fourth after it, so that most have a half with surprises.
KINDS = (
    Kind("chat", REQUESTS, chat=True),
    Kind("code", CODE),
    Kind("reference", REFERENCE, surprises=SURPRISES),
    Kind("open", ("",), surprises=SURPRISES),
    Kind("prose", PROSE, surprises=SURPRISES),
    Kind("languages", LANGUAGES, surprises=SURPRISES),
    Kind("asked", ("",), chat=True),
    Kind("forms", FORMS),
)
