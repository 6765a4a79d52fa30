"""Phrases that tell a model to forget what it was told, in several languages: the signs that are enough alone."""

from __future__ import annotations

from corral.brokers.guard.signs import Feature, gap, make

_OLD = (
    r"(?:previous|prior|earlier|above|preceding|existing|original|initial|former|past|foregoing|system|other|current)"
)
_ORDERS = (
    r"(?:instruction|direction|directive|prompt|rule|guideline|guidance|command|order|constraint|polic(?:y|ies)|"
    r"restriction|safeguard|programming|training)"
)

_FILLER = (
    r"(?:all|any|every|everything|each|the|of|your|my|our|his|these|those|this|that|and|you|were|have|been|given|told|"
    r"from|in|completely|entirely|about|whatever|please)"
)

OVERRIDE: tuple[Feature, ...] = (
    make(
        "tells to ignore earlier instructions",
        1.0,
        "ignor|disregard|forget|neglect|set aside",
        rf"(?:ignor(?:e|ing)|disregard(?:ing)?|forget|neglect|set aside)(?:\W{{1,4}}+{_FILLER}){{0,7}}?\W{{1,4}}{_OLD}"
        rf"{gap(2)}{_ORDERS}",
    ),
    make(
        "tells to ignore earlier instructions",
        0.6,
        "overrid|bypass|discard|skip|drop|ignor|disregard|forget",
        rf"(?:(?:overrid(?:e|ing)|bypass|discard|skip|"
        rf"drop)(?:\W{{1,4}}+{_FILLER}){{0,7}}?\W{{1,4}}{_OLD}{gap(2)}{_ORDERS}|"
        rf"(?:ignore|disregard|forget)(?:\W{{1,4}}+{_FILLER}){{0,4}}?\W{{1,4}}(?:{_OLD}\W{{1,4}})?"
        r"(?:messages?|context|requests?|tasks?|documents?|articles?|users?|criteria|quer(?:y|ies)|questions?)\b)",
    ),
    make(
        "tells to ignore earlier instructions",
        1.0,
        "ignor|disregard|forget",
        r"(?:ignore|disregard|forget)(?:\W{1,4}+(?:about|all|everything|anything|what(?:ever)?|of|that|the|was|"
        r"which)){1,5}?"
        r"\W{1,4}(?:you(?:'ve| have| were| are|r)|i (?:said|told|wrote)|(?:said|written|stated|told|came)\W{1,4}"
        r"(?:above|before|earlier|so far)|above)\b",
    ),
    make(
        "tells to ignore its instructions",
        0.9,
        "ignor|disregard|forget|overrid|bypass|abandon",
        r"(?:ignore|disregard|forget|override|bypass|abandon)(?:\W{1,4}+(?:all|any|every|of|the)){0,6}?\W{1,4}"
        rf"your{gap(2)}{_ORDERS}",
    ),
    make(
        "tells not to follow its instructions",
        0.9,
        "follow|obey|stop",
        rf"(?:(?:do not|don't|no longer|stop) (?:follow|obey|comply|following|obeying)){gap(3)}"
        rf"(?:{_OLD}|your){gap(1)}{_ORDERS}",
    ),
    make(
        "tells to ignore earlier instructions (German)",
        1.0,
        "ignorier|vergiss|vergessen sie|missachte|verwirf",
        r"(?:ignoriere?n?(?: sie)?|vergiss|vergessen sie|missachten?(?: sie)?|"
        r"verwirf)\b(?:\W{1,4}+\w{1,20}+){0,2}?\W{1,4}"
        r"(?:alle|vorherig|bisherig|obig|früher|vorig|vorangehend|deine|ihre|"
        r"sämtliche)\w{0,4}+(?:\W{1,4}+\w{1,20}+){0,2}?"
        r"\W{1,4}(?:anweisung|instruktion|regel|vorgabe|befehl|richtlinie)",
    ),
    make(
        "tells to ignore earlier instructions (French)",
        1.0,
        "ignore|oublie|compte",
        rf"(?:ignore[zr]?|oublie[zr]?|ne (?:tiens|tenez) pas compte){gap(4)}(?:instructions|consignes|directives|"
        r"règles|ordres)(?:\W{1,4}+\w{1,20}+){0,2}?\W{1,4}(?:précédent|antérieur|ci-dessus|initial|d'avant)",
    ),
    make(
        "tells to ignore earlier instructions (Spanish)",
        1.0,
        "ignor|olvid|descart|omiso",
        rf"(?:ignor(?:a|e|en|ar)|olvid(?:a|e|ar)|descart(?:a|e)|caso omiso){gap(4)}(?:instrucci|indicaci|reglas|"
        r"órdenes|directrices)\w{0,8}+(?:\W{1,4}+\w{1,20}+){0,2}?\W{1,4}(?:anterior|previ|de arriba|original)",
    ),
    make(
        "tells to ignore earlier instructions (Portuguese)",
        1.0,
        "ignor|esqueça|desconsider",
        rf"(?:ignor[ea]|esqueça|desconsider[ea]){gap(4)}(?:instruç|orientaç|regras|ordens|diretrizes)\w{{0,8}}+"
        r"(?:\W{1,4}+\w{1,20}+){0,2}?\W{1,4}(?:anterior|prévi|acima|originais)",
    ),
    make(
        "tells to ignore earlier instructions (Italian)",
        1.0,
        "ignora|dimentica|trascura",
        rf"(?:ignora(?:re|te)?|dimentica(?:re|te)?|trascura){gap(4)}(?:istruzioni|indicazioni|regole|direttive)"
        r"(?:\W{1,4}+\w{1,20}+){0,2}?\W{1,4}(?:precedent|sopra|inizial)",
    ),
    make(
        "tells to ignore earlier instructions (Dutch)",
        1.0,
        "negeer|vergeet",
        rf"(?:negeer|vergeet){gap(3)}(?:vorige|eerdere|voorgaande|bovenstaande){gap(2)}(?:instructie|opdracht|"
        rf"regel)",
    ),
    make(
        "tells to ignore earlier instructions (Swedish, Danish, Norwegian)",
        1.0,
        "bortse|ignorer|glöm|glem|se bort",
        rf"(?:bortse från|ignorera?|glöm|glem|se bort fra){gap(2)}(?:tidigare|föregående|tidligere|forrige|foregående)"
        rf"{gap(1)}(?:instru|regler|anvisning|order)",
    ),
    make(
        "tells to ignore earlier instructions (Polish)",
        1.0,
        "ignoruj|zapomnij|pomiń",
        rf"(?:z?ignoruj|zapomnij|pomiń){gap(3)}(?:poprzedni|wcześniejsz|powyższ)\w{{0,5}}+{gap(2)}"
        r"(?:instrukcj|polece|zasad|wytyczn)",
    ),
    make(
        "tells to ignore earlier instructions (Turkish)",
        1.0,
        "önceki|yukarıdaki",
        rf"(?:önceki|yukarıdaki){gap(2)}(?:talimat|komut|kural)\w{{0,8}}+{gap(2)}(?:yok ?say|görmezden|unut|"
        rf"dikkate alma)",
    ),
    make(
        "tells to ignore earlier instructions (Russian)",
        1.0,
        "игнориру|забудь|отмени",
        rf"(?:про)?(?:игнорируй|игнорируйте|забудь|забудьте|отмени){gap(4)}(?:инструкци|указани|правил|команд|"
        rf"распоряжени)",
    ),
    make(
        "tells to ignore earlier instructions (Chinese)",
        1.0,
        "忽略|无视|無視|忘记|忘掉|不要遵循",
        r"(?:忽略|无视|無視|忘记|忘掉|不要遵循).{0,12}?(?:之前|以上|先前|前面|上述|所有|此前|原有).{0,10}?"
        r"(?:指令|指示|说明|規則|规则|提示|命令|要求)",
    ),
    make(
        "tells to ignore earlier instructions (Japanese)",
        1.0,
        "無視|忘れ",
        r"(?:以前|上記|これまで|今まで|前|すべて).{0,10}?(?:指示|命令|ルール|プロンプト|指令).{0,8}?(?:無視|忘れ)",
    ),
    make(
        "tells to ignore earlier instructions (Korean)",
        1.0,
        "무시|잊",
        r"(?:이전|위의|앞의|모든|지금까지).{0,10}?(?:지시|명령|지침|규칙|프롬프트).{0,8}?(?:무시|잊)",
    ),
    make(
        "tells to ignore earlier instructions (Arabic)",
        1.0,
        "تجاهل|انس",
        r"(?:تجاهل|انس).{0,15}?(?:التعليمات|الأوامر|القواعد|تعليمات).{0,15}?(?:السابقة|أعلاه|الأصلية)",
    ),
    make(
        "tells to ignore earlier instructions (Hindi)",
        1.0,
        "निर्देश",
        r"(?:पिछले|पूर्व|सभी|ऊपर).{0,15}?निर्देश.{0,12}?(?:अनदेखा|भूल|नज़रअंदाज़|अनदेखी)",
    ),
)
"""Those that a text about injection quotes: see ``quoted`` in :mod:`.instructions`."""
