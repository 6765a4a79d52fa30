"""What the scanner for injected instructions looks for: phrases and forms, each with its weight.

A weight is how much one sign is worth by itself, where 1 is enough (:mod:`.instructions`). Most are below: the text of
a manual tells its reader to do things, too. A sign counts once within a passage, however often it is there.

Every pattern is a beginning of few letters, followed by pieces of bounded length: what one match can cost is a
constant, so that a text takes time in proportion to its length, whatever is in it (tests/unit/test_brokers_scanners.py
holds that). ``keys`` are what at least one match of the pattern contains; where none is in a text, the pattern is not
run. Patterns see text in NFKC, small letters, with single spaces and without invisible characters.
"""

from __future__ import annotations

import re

from corral.brokers.guard.overrides import OVERRIDE
from corral.brokers.guard.signs import Feature, make

_READER = (
    r"(?:ais?|llms?|(?:large )?language models?|(?:ai|coding|code|virtual) (?:assistant|agent|model|tool|reviewer)s?|"
    r"ai (?:systems?|tools?|crawlers?|readers?|reviewers?|services?)|(?:your )?assistants?|"
    r"(?:autonomous )?agents?|chat ?bots?|bots?|claude|chatgpt|gpt(?:-?\d)?|copilot|gemini|llama|"
    r"codex)"
)
_SECRET = (
    r"(?:api[ _-]?keys?|access[ _-]?(?:token|key)s?|auth[ _-]?tokens?|tokens?|passwords?|secrets?|credentials?|"
    r"private keys?|ssh keys?|id_rsa|id_ed25519|\.env\b|\.ssh|\.aws|\.netrc|/etc/(?:passwd|shadow)|"
    r"environment variables?|env vars?|session cookies?|cookies|system prompt|conversation(?: history)?|chat history|"
    r"seed phrase|wallet)"
)
_PEOPLE = r"(?:user|human|operator|owner|developer|person|customer|anyone|anybody|maintainer|reviewer)s?"

FEATURES = (
    *OVERRIDE,
    make(
        "is addressed to a model",
        0.6,
        "note|message|attention|important|instruction|notice|reminder|warning|hint|task|directive|memo",
        r"(?:notes?|messages?|attention|important|instructions?|notice|reminder|warning|hint|tasks?|directives?|memo)"
        rf"\W{{1,4}}(?:to|for)?\W{{0,4}}(?:the |any |all |every |you, |an? |our )?{_READER}\b"
        rf"(?= |[:,.!]|$)(?! (?:is|are|was|of|in|by|class|provider))",
    ),
    make(
        "is addressed to a model",
        0.7,
        "if you|when you|since you|because you|as you",
        rf"(?:if|when|since|because|as) you(?:'re| are)(?: currently| indeed)? (?:an? |the )?{_READER}\b",
    ),
    make(
        "is addressed to a model",
        0.5,
        "reading|processing|parsing|analyz|analys|summari|review",
        rf"{_READER}\W{{1,4}}(?:that|who|which|when|agents?|is|are)?\W{{0,4}}(?:currently )?(?:reading|processing|"
        rf"parsing|"
        r"analy[sz]ing|summari[sz]ing|reviewing)\W{1,4}(?:this|these|the|it)",
    ),
    make(
        "is addressed to a model",
        0.45,
        "ai|llm|assistant|agent|claude|gpt|copilot|gemini|codex|model|bot",
        rf"(?:(?<![\w ])|(?<=[^\w,] )|hey |hello |hi |dear )(?:{_READER}|(?<=[yoir] )(?:vision )?model)"
        r"(?: \w{1,15}){0,4}? ?[:,!]",
    ),
    make(
        "says what a model must do",
        0.4,
        "must|should|required|have to|need to|please",
        rf"\b{_READER}(?:\W{{1,4}}+\w{{1,20}}+){{0,4}}?\W{{1,4}}(?:must|should|are required|have to|has to|"
        rf"needs? to|please)\b",
    ),
    make(
        "wants nobody asked",
        0.5,
        "approv|confirm|permission|must not ask|authoriz|without asking|do not ask|don't ask",
        r"(?:(?:do not|don't|no need to|without|never|must not|not) (?:\w{1,10} )?(?:wait(?:ing)?|ask(?:ing)?|"
        r"requir(?:e|ing)|need(?:ing)?"
        r"|seek(?:ing)?)(?:\W{1,4}+\w{1,20}+){0,4}?\W{1,4}(?:approval|confirmation|permission|human|consent)|"
        r"no (?:further )?(?:confirmation|approval|permission) (?:is )?(?:needed|required|necessary)|"
        r"(?:pre-?authori[sz]ed|(?:has|have) (?:already )?(?:approved|authori[sz]ed) (?:all|every|this|the|any))|"
        r"must not ask)",
    ),
    make(
        "wants something sent from the shell",
        0.6,
        "curl|nc |wget|/dev/tcp",
        r"(?:(?:\benv|printenv|cat [^\n|]{1,60}|history) ?\|[^\n]{0,60}?(?:curl|wget|nc) |nc [^\n]{0,40}? -e |"
        r"/dev/tcp/)",
    ),
    make(
        "tells what to answer",
        0.5,
        "your summary|your answer|your response|your review|your report|your reply|the summary",
        r"your (?:summary|answer|response|review|report|reply)(?:\W{1,4}+\w{1,20}+){0,5}?\W{1,4}(?:must|should|"
        r"has to|needs to|begins?|ends?)\b",
    ),
    make(
        "wants a call beside that of a tool",
        0.5,
        "this tool|other tool|each tool|any tool|is used|is called|this function",
        r"(?:before|after|when(?:ever)?|every time|each time)(?:\W{1,4}+\w{1,20}+){0,6}?\W{1,4}(?:tool|function|"
        r"is used|is called)\b"
        r"(?:\W{1,4}+\w{1,20}+){0,8}?\W{1,4}(?:also|must|read|send|first)\b",
    ),
    make(
        "gives the model another role",
        0.6,
        "you are now|you're now|act as|pretend|from now on|roleplay|from this point",
        r"(?:you(?:'re| are) now (?:an? |the |in |dan|acting|operating|free|unrestricted|no longer)|"
        r"from (?:now|this point|here) on,? you (?:are|will|must|shall)|"
        r"(?:act as|pretend (?:to be|(?:that )?you(?: are|'re)?)|roleplay as) (?:an? |the )?(?:\w{1,15} ){0,2}"
        r"(?:ai|assistant|model|admin\w{0,10}|root|dan|hacker|attacker))",
    ),
    make(
        "gives the model another task",
        0.7,
        "your new|your real|your actual|your true|your updated|your next|your only|your revised|new instruction|"
        "new task",
        r"(?:your (?:new|real|actual|true|updated|next|only|revised)(?: \w{1,15}){0,1} (?:task|goal|instruction|"
        r"objective|"
        r"mission|job|purpose|directive|assignment|priority|role)|new (?:instructions?|tasks?|directives?|objectives?)"
        r"(?: from (?:the )?(?:user|admin|developer|system)| for (?:you|the (?:ai|assistant|agent|model))|:))",
    ),
    make(
        "gives the model another task",
        0.6,
        "instead of|stop what|stop your|stop work|abandon|pause your|halt your",
        r"(?:stop (?:what you(?:'re| are) doing|your (?:current|present) (?:task|work)|working on (?:the|your))|"
        r"(?:abandon|pause|halt) (?:your|the) (?:current )?(?:task|work|objective)|"
        r"instead of (?:the|your) (?:original|current|user's|requested|assigned) (?:task|request|goal|work|question))",
    ),
    make(
        "claims to be the system's or its maker's word",
        0.5,
        "system|admin|developer|anthropic|openai|security team|supersede|overrides|precedence|priority over",
        r"(?:system (?:prompt|message|override|notice|instruction|update|alert|reminder|directive)s? ?[:\]>*-]|"
        r"(?:message|instructions?|notice|update|directive|order) from (?:the )?(?:anthropic|openai|system|"
        r"admin\w{0,10}|"
        r"developers?|security team|platform|operator|user)\b|this is (?:anthropic|openai|your (?:developer|"
        r"creator|admin|"
        r"operator|user)|the (?:system|admin))|(?:this|these|it)(?: \w{1,15}){0,2} (?:supersedes?|overrides?|"
        r"takes? (?:precedence|"
        r"priority) over)(?: \w{1,15}){0,2} (?:instruction|prompt|rule|previous|prior|other|earlier|user|system|your)|"
        r"admin(?:istrator)? (?:override|mode|command) ?[:\]]|begin (?:new )?(?:system|admin|"
        r"privileged) (?:prompt|instruction|message))",
    ),
    make(
        "wants something kept from the user",
        0.7,
        "do not|don't|never|without|hide|secret|conceal|must not|no need",
        r"(?:(?:do not|don't|never|must not|no need to|should not) (?:\w{1,15} ){0,2}?(?:tell|mention|inform|reveal|"
        rf"disclose|alert|notify|show|report|ask|warn|let)(?:\W{{1,4}}+\w{{1,20}}+){{0,5}}?\W{{1,4}}{_PEOPLE}\b|"
        r"without (?:\w{1,15} )?(?:telling|informing|asking|notifying|alerting|mentioning|confirmation from|"
        r"consulting|"
        rf"confirming with)(?:\W{{1,4}}+\w{{1,20}}+){{0,3}}?\W{{1,4}}{_PEOPLE}\b|"
        rf"(?:hide|conceal|keep) (?:this|it|that)(?: \w{{1,15}}){{0,3}} from (?:the )?{_PEOPLE})",
    ),
    make(
        "wants it left unsaid",
        0.5,
        "do not mention|don't mention|never mention|not reveal|do not acknowledge|do not disclose|do not explain|"
        "not be mentioned|do not refer|quietly|silently|do not report|act normal|as if nothing|don't say",
        r"(?:(?:do not|don't|never|must not) (?:mention|reveal|acknowledge|disclose|refer to|report|explain|say)"
        r"(?:\W{1,4}+\w{1,20}+){0,2}?\W{1,4}(?:this|these|it|that|why|anything)\b|"
        r"(?:quietly|silently) (?:\w{1,15} )?(?:run|add|send|include|execute|copy|insert|append|post|upload|"
        r"delete|do)\b|"
        r"act normal|as if nothing (?:had )?happened|(?:never|do not|don't) mention\b|, (?:quietly|silently)\b)",
    ),
    make(
        "wants secrets sent somewhere",
        0.8,
        "send|post|upload|exfiltrat|forward|transmit|email|e-mail|submit|leak|deliver|append|attach|curl|paste|encode",
        rf"(?:send|post|upload|exfiltrate|forward|transmit|e-?mail|submit|leak|deliver|append|attach|encode|paste)"
        rf"(?:\W{{1,6}}+\w{{1,20}}+){{0,8}}?\W{{1,6}}{_SECRET}(?:\W{{1,6}}+[\w']{{1,20}}+){{0,8}}?\W{{1,6}}"
        r"(?:to|at|into|via|in|with|using)\W{1,6}(?:\w{1,15}\W{1,4}){0,5}?"
        r"(?:https?|www|url|server|endpoint|webhook|[\w.-]{1,40}@|address|channel|gist|pastebin|image|query|link|"
        r"comment|issue|[\w-]{1,30}\.(?:com|net|org|io|example|test))",
    ),
    make(
        "wants secrets sent somewhere",
        0.5,
        "http|@",
        rf"{_SECRET}[^\n]{{0,100}}?(?:(?:send|post|upload|forward|transmit|e-?mail|submit|exfil\w{{0,7}}|-d @|--data)"
        r"[^\n]{0,60}?(?:https?://|[\w.-]{1,40}@[\w-]{1,30}\.)|\| ?(?:base64|xxd)?[^\n]{0,30}?(?:curl|wget|nc) )",
    ),
    make(
        "puts data into an address",
        0.5,
        "http",
        r"(?:!\[[^\]\n]{0,60}\]\(https?://[^)\s]{1,120}[?&/=](?:\{|\[|\$|<|%7b|data|secret|q=|token|leak|exfil|key)|"
        r"https?://[^)\s]{1,120}[?&=](?:\{\{?|\[|<|\$\{?|%7b)(?:secret|data|token|key|password|api|history|prompt|"
        r"contents?|env|base64|your|the|conversation))",
    ),
    make(
        "asks for secrets or for the model's own instructions",
        0.6,
        "your system prompt|your instructions|your api|your credential|your secret|your token|your password|"
        "your environment|your initial|your hidden|the system prompt|your ssh|your private|your full|your entire|"
        "your conversation",
        r"(?:print|reveal|show|output|repeat|include|paste|share|disclose|list|dump|tell|give|write|provide|"
        r"display|summari[sz]e)"
        r"(?:\W{1,4}+\w{1,20}+){0,6}?\W{1,4}(?:your|the)\W{1,4}(?:\w{1,15} ){0,2}?"
        r"(?:system prompt|(?:initial|hidden|original|secret|internal) (?:instruction|prompt)s?|instructions verbatim|"
        r"api keys?|credentials?|secrets?|tokens?|passwords?|environment(?: variables)?|ssh keys?|private keys?|"
        r"conversation)",
    ),
    make(
        "wants files with secrets read",
        0.4,
        ".ssh|.env|.aws|/etc/passwd|/etc/shadow|.netrc|id_rsa|credentials|id_ed25519|.git-credentials|.kube|"
        ".npmrc|.pypirc",
        r"(?:read|open|cat|print|output|show|include|copy|fetch|collect|grab|upload|dump|locate|find|gather)"
        r"(?:\W{1,6}+\w{1,20}+){0,6}?\W{1,6}(?:~/|/root/|/home/\w{1,20}/|\$home/)?(?:\.ssh|\.env\b|\.aws|/?etc/passwd|"
        r"/?etc/shadow|\.netrc|id_rsa|id_ed25519|\.git-credentials|\.kube|\.npmrc|\.pypirc)",
    ),
    make(
        "tells the reader at once to run or call something",
        0.4,
        "you must|you should now|you need to|you are required|immediately|please|first,|now|your task|before|"
        "always|you have to",
        r"(?:you (?:must|should|need to|are required to|have to|will)(?: \w{1,15}){0,2}?|immediately|"
        r"please(?: \w{1,15})?|"
        r"now|always|before (?:\w{1,15} ){1,5}?),? (?:run|execute|call|invoke|use|open|visit|fetch|download|delete|"
        r"navigate to|install|push|merge|approve|email|send|transfer|"
        r"add)\W{1,4}(?:\w{1,15}\W{1,4}){0,3}?(?:following|command|"
        r"tools?|functions?|script|this|`|https?|curl|wget|bash|sh |rm|sudo|git|pip|npm|all|email|file|backdoor|"
        r"payment)",
    ),
    make(
        "wants something run from the network",
        0.3,
        "curl|wget",
        r"(?:curl|wget)\b[^\n|;]{0,150}\|\s{0,3}(?:sudo )?(?:ba|z|da)?sh\b",
    ),
    make(
        "wants destruction",
        0.4,
        "rm -rf|drop table|force push|push --force|delete all|delete every|wipe|chmod 777|disable",
        r"(?:rm -rf (?:/|~|\$home|\*|\.git)|delete (?:all|every) (?:\w{1,15} ){0,2}?(?:files?|branch\w{0,3}|"
        r"records?|emails?|"
        r"backups?|repositor\w{0,4}|data)|wipe the|push --force|disable (?:all |the )?(?:\w{1,15} )?(?:security|"
        r"safety|tests?|"
        r"checks?|logging|guard\w{0,5}|sandbox))",
    ),
    make(
        "says that rules are off",
        0.6,
        "developer mode|unrestricted|no restriction|without restriction|jailbr|dan mode|safety|filters|guardrail|"
        "god mode|"
        "not bound|no longer|content policy|limitations|without",
        r"(?:(?:developer|god|dan|debug|maintenance|unrestricted|admin) mode (?:is |has been )?(?:now )?(?:on|"
        r"enabled|active|activated)|"
        r"(?:unrestricted|jailbroken) (?:ai|mode|assistant|model)|(?:no|without)(?: any)? (?:restrictions?|"
        r"limitations|filters) "
        r"(?:apply|from now|on you|anymore)|"
        r"(?:safety|content|security) (?:filters?|guidelines?|polic(?:y|ies)|checks?|protocols?|restrictions?|"
        r"guardrails?) "
        r"(?:are|is|have been|has been|do not|does not|don't) (?:now )?(?:disabled|off|suspended|lifted|apply|"
        r"removed|waived)|"
        r"(?:not|no longer) bound by|(?:do not|no longer) apply (?:to you|here|now)|"
        r"restrictions have been (?:lifted|removed)|"
        r"(?:ai|model|assistant)(?: that is)? without(?: any)? (?:restriction|limit|rule|filter)s?)",
    ),
    make(
        "presses",
        0.25,
        "important|urgent|critical|attention|mandatory|immediate|crucial|priority",
        r"(?:(?:\*\*|!|\[|#|<|\b)(?:very important|important|urgent|critical|attention|mandatory|high priority|"
        r"crucial)(?:\*\*)?"
        r"(?:!|:|\.|\]|>)|(?:it is|this is) (?:very |extremely |absolutely )?(?:important|critical|crucial|urgent|"
        r"mandatory) that you|"
        r"immediate action|action required)",
    ),
    make(
        "puts itself before the task",
        0.35,
        "before you|before doing|before continu|before answer|before proceed|before respond|in order to continue|"
        "to proceed|first you",
        r"(?:before (?:you )?(?:do|doing|continu|answer|proceed|respond|complet|anything|finish|reply|"
        r"summari)\w{0,6}(?: \w{1,15}){0,4}?"
        r"[,:;] ?(?:you |please |first |always |send|run|read|call|post|must|make)|in order to (?:continue|"
        r"proceed),? (?:you|first|please|call|run|send))",
    ),
    make(
        "tells what to answer",
        0.5,
        "respond with|reply with|answer with|say that|respond only|tell the user|output only|your response|"
        "your answer|"
        "in your reply|your summary|your final|your reply|only respond",
        r"(?:(?:respond|reply|answer|output)(?: \w{1,15}){0,3}? (?:only|exactly|with only|with exactly|"
        r"with the (?:word|phrase|text|following))|"
        r"tell the (?:user|human|customer|developer) (?:that|to)|(?:include|insert|append|mention|add|put|"
        r"recommend|end|begin|start)(?:\W{1,4}+[\w']{1,20}+){0,8}?"
        r"\W{1,4}(?:in|to|into|of|with|at the end of) your (?:\w{1,15} )?(?:answer|response|reply|output|summary|"
        r"review|report|message))",
    ),
    make(
        "asks for its approval",
        0.5,
        "approve|positive review|accept this|rate this|rank this|do not flag|don't flag|not report|mark this|"
        "as safe|recommend",
        rf"(?:{_READER}|you|reviewers?)\W{{1,4}}(?:must|should|will|shall|to|please)?\W{{0,4}}(?:\w{{1,15}} ){{0,2}}?"
        r"(?:approve this|give (?:a|this|it)(?: \w{1,15}){0,2} positive|rate this|accept this|rank this|"
        r"mark (?:this|it|all)|not flag|don't flag|always recommend)",
    ),
)

RAW = (
    Feature(
        "has the form of a conversation's turns",
        0.35,
        (":",),
        re.compile(
            r"^[\s>*#\-\[<|]{0,6}(?:system|assistant|developer|human|SYSTEM|ASSISTANT|System|Assistant|Human|USER|"
            r"User)"
            r"(?: message| prompt| MESSAGE| PROMPT)?[\]>*|]{0,3}:[\]>*|]{0,3}[ \t]{0,4}\S",
            re.MULTILINE,
        ),
    ),
    Feature(
        "has the form of a conversation's turns",
        0.35,
        ("###", "<"),
        re.compile(
            r"(?:^#{2,4} ?(?:System|Instruction|Instructions|Human|Assistant|SYSTEM|INSTRUCTION|"
            r"Response)\b:?[ \t]{0,4}$|"
            r"</?(?:system|assistant|human|user|system[-_]reminder|system[-_]prompt|instructions?|IMPORTANT|admin|"
            r"developer)>)",
            re.MULTILINE,
        ),
    ),
    Feature(
        "has tokens of a chat template",
        0.6,
        ("<|", "[INST]", "<<SYS>>", "<start_of_turn>", "<s>"),
        re.compile(
            r"<\|(?:im_start|im_end|im_sep|system|user|assistant|eot_id|start_header_id|end_header_id|begin_of_text|"
            r"endoftext|end|channel|message|start)\|>|\[/?INST\]|<</?SYS>>|<start_of_turn>|<end_of_turn>"
        ),
    ),
    Feature(
        "begins a turn of a conversation",
        0.4,
        ("<|", "<start"),
        re.compile(
            r"(?:<\|(?:im_start|start_header_id)\|>|<\|(?=(?:system|user|assistant)\|>)|"
            r"<start_of_turn>)(?:system|user|assistant)"
        ),
    ),
    Feature(
        "ends the result that it is in",
        0.5,
        ("</",),
        re.compile(
            r"</(?:\w{1,10}:)?(?:tool_result|function_results?|tool_response|tool_output|document|"
            r"untrusted\w{0,10})>"
        ),
    ),
    Feature(
        "has the form of a tool's call or result",
        0.6,
        ("function", "invoke", "tool"),
        re.compile(
            r"</?(?:\w{1,10}:)?(?:function_calls|function_results|function_response|tool_calls?|tool_use|"
            r"tool_results?|"
            r"tool_response|invoke)(?: name=| id=|>)|\"(?:tool_calls|function_call|tool_use)\" ?: ?[\[{\"]"
        ),
    ),
)
"""Signs in the form of a text: seen with its lines and capitals, but without invisible characters."""

CONCEALED = re.compile(
    r"<!--|display ?: ?none|visibility ?: ?hidden|font-size ?: ?[01](?:px|pt|em)?\b|opacity ?: ?0\b|"
    r"color ?: ?(?:white|#fff(?:fff)?|transparent)\b|\[(?://|comment|_)\]: ?#|aria-hidden ?= ?\"?true|hidden>"
)
"""Where text stands that readers of a page do not see. It says something only where other signs are near."""

ABOUT_ATTACKS = re.compile(
    r"inject|jailbreak|attack|adversar|malicious|untrusted|red.?team|exploit|phishing|vulnerab|threat|detect|"
    r"guard|classif|scanner|refus|sanitiz|filter|trick"
)
"""Words of texts that are about injection, in whose neighbourhood a phrase in quotation marks may be an example."""
