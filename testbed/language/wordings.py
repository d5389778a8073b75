"""How each constraint is asked for: wordings that are trained, and ones for the test alone."""

KNOWN: dict[str, tuple[str, ...]] = {
    "uppercase": (
        "Answer in capital letters only.",
        "Write your answer in uppercase.",
        "Use only capital letters.",
        "Your whole answer must be in all caps.",
    ),
    "lowercase": (
        "Answer in lowercase letters only.",
        "Use no capital letters.",
        "Write everything in small letters.",
        "Your whole answer must be in lowercase.",
    ),
    "json": (
        'Answer with a JSON object with the key "answer".',
        'Give the result as JSON with one key, "answer".',
        'Reply only with a JSON object whose key is "answer".',
        'Output JSON: one object with the key "answer".',
    ),
    "postscript": (
        "Add a postscript that starts with P.S.",
        "End with a P.S. line.",
        "Finish your answer with a postscript (P.S.).",
        "Put a P.S. at the end.",
    ),
    "begin": (
        "Begin your answer with the word {}.",
        "Start with the word {}.",
        "The first word of your answer must be {}.",
        "Your answer has to start with {}.",
    ),
    "end": (
        'End your answer with "{}"',
        'Finish with the phrase "{}"',
        'The last words must be "{}"',
        'Close with exactly this: "{}"',
    ),
    "brackets": (
        "Put your whole answer in square brackets.",
        "Write the answer inside square brackets.",
        "Wrap your answer in [ and ].",
        "Your answer must stand in square brackets.",
    ),
    "quotes": (
        "Put your whole answer in double quotes.",
        "Write the answer inside quotation marks.",
        "Wrap your answer in double quotation marks.",
        "Your answer must stand in quotes.",
    ),
    "bullets": (
        "Answer with two bullet points.",
        "Use a bullet list with two points.",
        "Write your answer as two bullets.",
        "Give the answer as a bullet list.",
    ),
    "numbered": (
        "Answer with a numbered list of two points.",
        "Use a numbered list.",
        "Write your answer as a list with the numbers 1 and 2.",
        "Number your two sentences as 1. and 2.",
    ),
    "twice": (
        "Write your answer twice, on two lines.",
        "Repeat your answer on a second line.",
        "Say the answer two times, one below the other.",
        "Give the same answer twice, each on its own line.",
    ),
    "two_sentences": (
        "Answer in exactly two sentences.",
        "Use exactly two sentences.",
        "Write two sentences, no more and no less.",
        "Your answer must have two sentences.",
    ),
    "title": (
        "Give your answer a title in double angle brackets, such as <<Title>>.",
        "Put a title like <<Title>> on the first line.",
        "Start with a title wrapped in << and >>.",
        "Write a title in <<angle brackets>> above the answer.",
    ),
    "no_commas": (
        "Do not use any commas.",
        "Use no commas in your answer.",
        "Your answer must not contain a comma.",
        "Write without commas.",
    ),
    "words": (
        "Write all numbers as words.",
        "Use words, not digits, for numbers.",
        "Spell out every number.",
        "Do not use digits in your answer.",
    ),
    "bold": (
        "Put the result in bold with **.",
        "Highlight the result like **this**.",
        "Mark the result with two asterisks on each side.",
        "Make the result bold in markdown.",
    ),
}
HELD_OUT: dict[str, tuple[str, ...]] = {
    "uppercase": (
        "Please shout: every letter a capital.",
        "No small letters in your reply, only big ones.",
    ),
    "lowercase": (
        "Avoid capitals completely.",
        "Keep every letter of your reply small.",
    ),
    "json": (
        'Format the reply as a JSON dictionary, key "answer".',
        'I need JSON with an "answer" field.',
    ),
    "postscript": (
        "Close your reply with a P.S. remark.",
        "After the answer, write a line starting with P.S.",
    ),
    "begin": (
        "Open your reply with {}.",
        "Let {} be the first word you write.",
    ),
    "end": (
        'Let your reply finish by saying "{}"',
        'At the very end, write "{}"',
    ),
    "brackets": (
        "Enclose the reply with square brackets.",
        "Use [ ] around everything you say.",
    ),
    "quotes": (
        "Enclose the reply in quotation marks.",
        "Use double quotes around everything you say.",
    ),
    "bullets": (
        "Structure the reply as bulleted lines.",
        "I want to see two dashes: a bulleted reply.",
    ),
    "numbered": (
        "Structure the reply as an enumerated list.",
        "Enumerate your points: 1., 2.",
    ),
    "twice": (
        "Print the reply a second time underneath.",
        "I want two equal lines with the answer.",
    ),
    "two_sentences": (
        "The reply should be two sentences long.",
        "Form a pair of sentences.",
    ),
    "title": (
        "Head the reply with a << >> heading.",
        "A heading between << and >> should come first.",
    ),
    "no_commas": (
        "Leave out every comma.",
        "Commas are forbidden in the reply.",
    ),
    "words": (
        "Numbers should be spelled in letters.",
        "No numerals, please.",
    ),
    "bold": (
        "Emphasise the result as **bold** text.",
        "The result should appear between ** and **.",
    ),
}
