"""What responses say around an answer, in the eight languages whose responses are read. Data, no logic.

Every field is a regular expression in lower case, its alternatives between ``|``; a space stands for white space.
Words of languages with spaces match whole words only.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Language:
    """Holds the words of one language.

    Attributes:
        noun: what every ``answer`` holds: a text without any of these has none.
        answer: "the answer", up to the verb or colon.
        verb: "is", between "the answer" and the answer itself.
        option: "option", before a letter.
        ending: what may stand after the answer in inverted word order, up to the end of the sentence.
        adverb: "therefore", between the verb and the answer.
        final: what makes an answer a final one.
        denial: "not", before an answer.
        supposed: "if", before "the answer is".
        premise: "if", anywhere in the sentence before "the answer is".
        lead: words that may stand before "answer" in its clause; after others it is somebody else's, or another one.
        limit: what, right before a boxed answer, makes it a bound or a part: "at least".
        rejected: what, before it in its clause, makes it no answer: "we rule out".
        fault: "wrong": said of an answer after it, it takes it back.
        others: "the others": they may be wrong.
        retraction: what takes an answer back, wherever it stands after it.
        hedge: what leaves an answer open, wherever it stands beside it.
        opinion: "I think": it leaves an answer open after it, not before it.
        correct: "correct", "the answer", after "option B is".
        alternative: "or".
        both: "and", between parts of a list.
        but: "but".
        condition: words that, in the answer's sentence, limit it.
        remark: how a sentence begins that speaks about the answer instead of giving it.
        reason: how an explanation after an answer begins.
        contrast: "and not", after an answer, before what it is not.
        sentence: words of sentences, which short answers lack.
        copula: "it is", "the colour is", before what is.
        be: verbs of which a plain sentence has one.
        article: articles, left out when texts are compared.
        yes: "yes".
        no: "no".
        about: "about", before a number.
        closing: short sentences that close a response, or head its explanation.
    """

    noun: str
    answer: str
    verb: str
    option: str
    ending: str = ""
    adverb: str = ""
    final: str
    denial: str
    supposed: str
    premise: str
    lead: str
    limit: str = ""
    rejected: str = ""
    fault: str
    others: str
    retraction: str
    hedge: str
    opinion: str
    correct: str
    alternative: str
    both: str
    but: str
    condition: str
    remark: str
    reason: str
    contrast: str
    sentence: str
    copula: str
    be: str
    article: str = ""
    yes: str
    no: str
    about: str
    closing: str


ENGLISH = Language(
    noun="answer|option|choice|correction|edit",
    answer=r"(?:final |correct |right )?answer(?: (?:to|for|of) (?:[^\s.:]+ ){0,7}[^\s.:]+)??|(?:correct|right"
    r"|best) (?:option|choice)|(?:correction|edit)(?=[*_\s]*:)",
    verb="is|are|was|would be|should be|must be|will be",
    option="option|choice|answer|letter",
    adverb="therefore|thus|hence|simply|clearly|definitely|certainly|indeed|then|so|exactly",
    final="final",
    denial=r"(?:\w+ly )?(?:not|never|neither|nor|no longer|none of)",
    supposed="if|whether|unless|suppose|supposing|assume|assuming|not|never|cannot|than|can't|isn't|doesn't|don't"
    "|wouldn't|couldn't|why|how",
    premise="if|unless|assuming|suppose|supposing",
    lead="the|this|that|my|our|so|therefore|thus|hence|then|and|but|now|here|final|finally|correct|right|best|short"
    "|complete|full|overall|exact|numerical|i|we|think|believe|get|conclude|see|say|it|seems|appears|follows|means"
    "|in|conclusion|consequently|ultimately|clearly|is|to|question|as|a result|would|will|should|must|actually|no"
    "|wait|on second thoughts?"
    "|gives?|arrive|at|reach|obtain|have|let|me|provide|based|on|from|above|analysis"
    "|chart|figure|graph|image|diagram|table"
    "|reasoning|information|given|these",
    limit=r"at least|at most|more than|less than|fewer than|other than|greater than|up to|between(?: \S+ and)?|from"
    "|minus"
    "|negative|half of|twice|opposite|nor|without|not",
    rejected=r"rul(?:e|ed|ing) out|exclud\w+|eliminat\w+|cross\w* out|wrong|incorrect|would|might|could|neither|isn't"
    r"|(?:put|write|enclose) (?:\w+ ){1,3}in|everything|anything",
    fault="wrong|incorrect|invalid|mistakes?|errors?|false|erroneous|inconsistent|contradicts?|flawed|inaccurate"
    "|eliminated|excluded|distractor|no good|retract|withdraw|overlooked|swapped|confused|mixed up|hasty|forgot"
    "|was off",
    others="others?|rest|remaining|alternatives?|distractors|options|choices|claims?|statement|would",
    retraction="wait|scratch (?:that|it)|strike that|hold on|on second thoughts?|sorry|oops|whoops|my (?:mistake"
    r"|bad|apologies)|apolog\w+|i(?: was|'m| am) (?:wrong|mistaken|not)|(?:made|make) an? (?:\w+ )?(?:mistake"
    r"|error)|mistaken(?:ly)?|let(?: me|'s| us) (?:re\w*|double|check|correct|verify|think|count|look|see|try"
    r"|change|fix)|recount\w*|recheck\w*|reconsider\w*|reconsidering|recalculat\w*|rethink\w*|re-\w+|change my"
    "|i (?:change|changed|meant|mean|take)|mean to say|hm+|nope|disregard|ignore (?:that|this|the|my)|make that"
    r"|not quite|(?:this|that|it|which)(?:'s| is| was)(?: \w+)? not (?:right|correct)|miscount\w*|misread|typo"
    r"|revis\w+|corrected|correcting|correction|(?:that|this|it)(?:'s| is| was| seems) (?:wrong|incorrect)|actually"
    r"|or rather|well,? (?:no|maybe)|no wait|no sorry|cancel that|never\s?mind|edit:|update:|should (?:be|have been"
    r"|say|read)|must (?:be|have been)|upon (?:closer|further|re)\w*|on (?:closer|reflection)|looking (?:again"
    "|closer|more)|to be corrected",
    hedge=r"no idea|maybe|perhaps|possibly|probably|presumably|likely|(?:not|n't) (?:\w+ )?(?:sure|certain|confident"
    r"|positive|clear)|(?:can't|cannot|can not|couldn't|could not|don't|do not) (?:\w+ )?(?:tell|say|be sure"
    r"|be certain|know|determine|rule out|exclude|see (?:clearly|well))|(?:isn't|aren't|wasn't) (?:\w+ )?(?:sure"
    r"|certain|clear|right|correct)|unsure|uncertain\w*|unclear|unknown|guess(?:ing)?|(?:could|might"
    r"|may)(?: \w+)? be|(?:could|might|may) (?:also|as well|equally|have)|hard to (?:tell|say|read|see)"
    "|difficult to (?:tell|say|read|see|determine)|alternatively|either|depend(?:s|ing)|(?:also|equally|both"
    "|just as) (?:possible|plausible|correct|valid|right|acceptable|likely)|plausible|(?:is|are|seems?"
    r"|remains?) (?:\w+ )?possible|tentative\w*|i'd say|i would say|i doubt|some doubt|in doubt|doubtful|ambiguous"
    r"|if i had to|best guess|though it|cannot be sure|who knows|arguably|toss-?up|low confidence|not \d+\s?%"
    r"|\d+\s?% (?:sure|certain|confident|confidence)|confidence: (?:low|medium|\d|[1-7]\d)\w*|hunch|speculat\w+"
    "|rough estimate|grain of salt|either way|(?:cannot|can't) verify|50/50|don't quote me|i'd (?:go for|rather)"
    "|i prefer",
    opinion="i (?:think|believe|suppose|assume|feel)|in my opinion",
    correct=r"correct|right|best|the answer|the (?:\w+ )?(?:answer|choice|option)",
    alternative="or|and/or|alternatively|versus|vs",
    both="and",
    but="but|however",
    condition="if|unless|assuming|provided|except|although|though|yet|rather|otherwise|instead",
    remark="(?:very |quite |so |pretty |rather |fairly |easily |clearly |directly |already |also |right )*(?:clear"
    "|obvious|evident|apparent|visible|shown|seen|given|found|displayed|indicated|depicted|listed|stated|written"
    "|marked|based|derived|determined|obtained|calculated|computed|located|provided|presented|hidden|simple"
    "|straightforward|easy|hard|difficult|tricky|unclear|unknown|ambiguous|readable|supported|consistent|confirmed"
    "|explained|discussed|contained|represented|illustrated|there|here|below|above|correct|incorrect|wrong|needed"
    "|required|important|debatable|subjective|available|missing|pending|coming|next|open|self-evident"
    r"|right)(?=\s*(?:$|[,.;:!]|(?:from|in|on|at|by|to|as|because|since|that|for|if|when|here|there|above|below|and"
    r"|with|once|enough|now|but|after|under|inside)\b))|as follows|as (?:shown|seen|given|above|below|stated"
    "|explained|described|discussed|mentioned|noted|indicated|depicted)|up to|one of|what|whatever|which|how|that"
    r"|(?:in|on|at|from|by|within|under|inside|via) (?:\S+ ){1,4}?(?:charts?|figures?|graphs?|images?|pictures?"
    "|plots?|tables?|legends?|diagrams?|texts?|passages?|questions?|data|axis|titles?|captions?|documents?|pages?"
    r"|photos?|maps?|labels?|counting|looking|comparing|reading|adding)|by \w+ing|(?:can|could|may|might|must"
    r"|should|will|would|has to|have to|needs to|cannot|can't) (?:\w+ )?(?:be|not)|i(?=\s)|i'm|i'll|i'd|i've|we"
    "|we'll|let|let's|let me|to (?:find|determine|answer|solve|calculate|compute|get|know|see|figure|do)|looking"
    "|based on|step|first of all|first,|please|as an ai|sorry|unfortunately|see|refer|look|check|consider|count"
    "|recall|remember|note|the (?:question|image|chart|figure|picture|graph|plot|diagram|photo"
    r"|table) (?:\w+ )?(?:shows?|asks?|is|does|has|contains|displays?|depicts?|provides?|indicates?|can)"
    "|there (?:is|are) (?:no|not)|it (?:is|'s) (?:clear|obvious|hard|difficult|unclear|evident|impossible|easy)"
    "|it depends|depends|n/a|none given|not (?:sure|known|given|visible|clear|available|possible|shown|enough"
    "|provided|stated|mentioned)|impossible to",
    reason="without (?:a |any )?doubt|no doubt|for sure|of course|definitely|certainly|clearly|obviously|indeed"
    "|because|since|as (?:shown|seen|indicated|can|the|it|we|per|stated|depicted|there|this|that|they|you|i|both"
    "|all|no|each|its|his|her|their|illustrated|given|noted|displayed|listed|marked)|due to|based on|given (?:that"
    "|the)|according to|thanks to|owing to|judging (?:by|from)|seeing|considering|by (?:counting|looking|reading"
    r"|comparing|adding)|from the (?:\S+ ){0,2}(?:chart|figure|graph|image|picture|plot|table|legend|diagram|data"
    r"|text|map|photo)|in the (?:\S+ ){0,2}(?:chart|figure|graph|image|picture|plot|table|legend|diagram|data|text"
    "|map|photo)",
    contrast="not|rather than|instead of|as opposed to|unlike|and not|but not",
    sentence="i|i'm|it's|there's|is|isn't|are|aren't|was|wasn't|were|weren't|has|have|had|shows?|appears?|seems?"
    "|think|believe|would|could|should|can|can't|cannot|do|don't|does|doesn't|because|since|so|therefore|thus"
    "|sorry|unable|unsure|maybe|perhaps|either|or|need|needs|let's|let|will|must|may|might|depends|based",
    copula=r"(?:it|this|that|they|the(?: [\w-]+){1,6}) (?:is|are|was|were)|(?:it|that|he|she)'s",
    be="is|are|was|were|has|have|it's|that's|he's|she's",
    article="an|the|a",
    yes="yes|yeah|yep|true",
    no="no|nope|false",
    about=r"about|approximately|approx\.?|around|roughly|nearly|almost|circa|ca\.|exactly|only|just|a total of"
    "|in total|equal to|equals",
    closing=r"thank.*|done|q\.?e\.?d|end|cheers|good luck|hope (?:this|that|it) helps|i hope .*|ok|okay|great|sure"
    r"|alright|well|enjoy|step \d+.*|figure \d+.*|see .*|source.*|explanation|reasoning|reason|note",
)
CHINESE = Language(
    noun="答|正解|更正|纠正|修正",
    answer="(?:(?:最终|最終|最后|最後|正确|正確|标准|標準)的?)?(?:答案|正解|答)|(?:更正|纠正|修正)(?=:)",
    verb="(?:就|应该|應該|应|應|便|即|该)?(?:是|为|為|选择|選擇|选|選)",
    option="选项|選項|选择|選擇|选|選",
    ending="(?:选项|選項|项|項)",
    final="最终|最終|最后|最後",
    denial="不是|不|非|并非|並非|没有|沒有",
    supposed="如果|假如|若|假设|假設|是否|要是|难道|倘若",
    premise="如果|假如|若|假设|要是",
    lead="根据|由|图|表|上述|分析|可见|得出|计算|所以|因此|故|综上所述|综上|那么|则|可知|可得|由此|本题|这道题|该题|此题|题目|问题|您|我们?|的|最终|最后|正确|回|应该?|选择?",
    limit="至少|至多|超过|不到",
    rejected="排除|学生|错误",
    fault="错误|不正确|有误|无效|不成立|错了|矛盾",
    others="其他|其它|其余|另外|选项都|均|都",
    retraction="等等|等一下|等下|等一等|稍等|不对|不對|更正|纠正|糾正|修正|订正|抱歉|对不起|對不起|不好意思|重新"
    "|其实|其實|实际上|實際上|应该是|應該是|应为|應為|应是|我错|我錯|说错|說錯|弄错|弄錯|搞错|搞錯|看错|看錯|数错"
    r"|數錯|算错|算錯|写错|错了|錯了|有误|有誤|改为|改為|改成|改选|而是|(?:^|[,。;!\s])不(?:是)?[,，。!]|再看|再想"
    "|再数|再數|仔细看|我收回|准确地说|准确来说",
    hedge="可能|也许|也許|或许|或許|大概是|不确定|不確定|不太确定|不敢确定|不能确定|无法确定|無法確定|不肯定|好像"
    "|似乎|或者|还是|還是|猜|也可以|也行|不清楚|说不准|說不準|吧(?:[。!?]|$)|恐怕|难说|难以|不知道|未必|不好说"
    "|要么|没把握|存疑|怀疑",
    opinion="我认为|我觉得|我想|我感觉",
    correct="(?:是|为)?(?:正确|答案|对)",
    alternative="或|或者|还是|還是",
    both="和|与|與|及|以及",
    but="但|但是|不过|不過|然而|可是",
    condition="如果|假如|除非|除了",
    remark="很?(?:明显|明顯|清楚|清晰|显然|顯然)|非常(?:明显|清楚)|显而易见|顯而易見|一目了然|可以|如下|在(?:图|圖|表|文)|(?:从|從|由)(?:图|圖|表|上|下|文|数据)"
    "|根据|根據|见|見|需要|让我|讓我|我|正确的|正確的|错误的|未知|不明|无法|無法|取决|图中|圖中|首先|显示|看",
    reason="毫无疑问|因为|因為|由于|由於|根据|根據|如图|如圖|理由|原因|从图|从圖|见图|所以",
    contrast="而不是|而非|不是",
    sentence="是|有|在|个|可以|因为|因為|显示|顯示|我|为|為|了|答案|看|能|会|會|需要|很|比|都",
    copula=r"[^\s,。:;]{1,12}(?:是|为|為)",
    be="是|为|為",
    yes="是|是的|对|對|对的|正确|正確|有",
    no="否|不是|不|不对|没有|沒有|错误",
    about="大约|大約|约|約|大概|共|一共|总共|共有|有|共计|等于",
    closing="谢谢|解释|解析|完毕|以上.*",
)
JAPANESE = Language(
    noun="答|正解|訂正",
    answer="(?:(?:最終的な|最終|正しい|正確な|正解の)の?)?(?:答え|答|回答|解答|正解)|訂正(?=:)",
    verb="は|とは",
    option="選択肢|オプション",
    ending="(?:です|だ|である|であります|になります|となります|でございます|です(?:ね|よ)|となる|になる"
    "|のようになります|を選びます)",
    final="最終",
    denial="不正解",
    supposed="もし|仮に",
    premise="もし|仮に",
    lead="よって|したがって|従って|ゆえに|だから|つまり|以上より|以上から|この|問題|私|の",
    limit="少なくとも",
    rejected="以外|除く",
    fault="間違い|誤り|不正解|正しくない|誤って",
    others="他|その他|残り|ほか",
    retraction="待って|待った|ちょっと待|いや|いえ[、,]|違います|違いました|違う|違っ|ちがう|ちがい|訂正|修正"
    "|すみません|すいません|ごめん|間違|まちがえ|やっぱり|やはり|失礼|正しくは|じゃなくて|実は|実際は|もう一度"
    "|数え直|見直|考え直|撤回|よく見ると|申し訳|改め",
    hedge="かもしれ|かも知れ|かも[。!?]|たぶん|多分|おそらく|恐らく|または|もしくは|あるいは|それとも|でしょう"
    "|だろう|わかりません|分かりません|わからない|分からない|不明|自信|確信|不確か|はっきりしない|かな(?:[。!?]|$)"
    "|どちらか|可能性|断定|気がし|推測",
    opinion="と思い|と思う|と思われ|と考え",
    correct="正解|正しい|答え",
    alternative="または|もしくは|あるいは|それとも",
    both="と|および|及び",
    but="しかし|でも|だが|ですが|けれど|けど|ただし",
    condition="もし|ただ|除",
    remark="明らか|明白|はっきり|(?:図|グラフ|画像|表|凡例)(?:から|より|に|を|で|の)|以下|次の|わか|分か|見れば|見て|読み取|簡単|上記|下記|不明"
    "|まず|私|明確",
    reason="なぜなら|理由",
    contrast="であって|ではなく",
    sentence="です|ます|ました|ません|である|は|が|から|ので|ある|いる|この|その|を",
    copula=r"[^\s,。、:;]{1,12}は、?",
    be="は",
    yes="はい|ええ|そうです|うん",
    no="いいえ|いや|違います",
    about="約|およそ|だいたい|およそ|全部で|合計|計",
    closing="ありがとう.*|理由|説明",
)
SPANISH = Language(
    noun="respuesta|solución|correct|resultado|corrección",
    answer="(?:respuesta|solución)(?: (?:final|correcta|definitiva))?(?: a la pregunta)?|(?:opción|alternativa"
    "|respuesta) (?:correcta|final)|resultado(?: final)?|corrección(?=:)",
    verb="es|es la|sería|son|será",
    option="opción|opcion|respuesta|alternativa|letra|la opción|la letra|inciso",
    adverb="por tanto|por lo tanto|entonces|claramente|simplemente|pues|así|por consiguiente",
    final="final|definitiva",
    denial=r"no (?=\S)|nunca|ni|tampoco|ningun[oa]",
    supposed="si|no|cuando|porque|aunque",
    premise="si",
    lead="la|mi|nuestra|así que|por (?:lo )?tanto|entonces|pues|luego|y|pero|creo|pienso|que|final|correcta|es",
    limit="al menos|como máximo|entre|menos|más de",
    rejected=r"descart\w+|incorrect[ao]",
    fault="incorrect[ao]s?|falso|falsa|erróne[ao]|errad[ao]|mal|errores|error|inválid[ao]",
    others="otr[ao]s|demás|resto",
    retraction=r"esper[ae]n?|un momento|no espera|perd[oó]n\w*|disculp\w+|corrección|corrijo|corregir|correcciones"
    r"|mejor dicho|en realidad|de hecho|me equivoqué|me he equivocado|equivocad\w+|equivocación|lo siento"
    r"|rectific\w+|digo|quise decir|quiero decir|más bien|pensándolo (?:bien|mejor)|mirando (?:de nuevo|mejor|bien)"
    "|(?:un|mi|hay) error|fe de erratas|revisando|recontando|déjame|debería ser|debe ser|ahora que|bueno no"
    "|contando de nuevo|ups",
    hedge=r"ni idea|quizás?|tal vez|a lo mejor|probablemente|posiblemente|(?:podría|pudiera|puede)(?: \w+)? (?:ser|que)"
    r"|no (?:estoy|es) (?:\w+ )?(?:segur[oa]|clar[oa]|ciert[oa])|no sé|no lo sé|no sabría|o bien"
    "|difícil (?:de )?(?:decir|saber)|dud[oa]s?|depende|parece|diría|acaso|también (?:es |podría |puede )|ambas"
    "|incierto|no se (?:sabe|puede|ve)|sin estar segur[oa]",
    opinion="creo|pienso|supongo|opino",
    correct=r"(?:la |el )?(?:\w+ )?(?:correct[ao]|respuesta)",
    alternative="o|u|o bien",
    both="y|e",
    but="pero|sin embargo",
    condition="si|aunque|excepto|salvo|sino|a menos",
    remark="(?:muy |bastante )?(?:clar[oa]|obvi[oa]|evidente|visible|sencill[oa]|fácil|difícil|desconocid[oa])"
    "|se (?:puede|ve|muestra|encuentra|observa|deduce|obtiene)|pued[eo]|está|depende|(?:en|del?|con) (?:el|la"
    r"|l)\s?(?:gráfic[oa]|imagen|figura|leyenda|tabla|diagrama)|en la|como sigue|la siguiente|necesito|tengo|vamos"
    "|veamos|primero hay|hay que|no (?:sé|se|puedo|está|es)|según|para|yo|lo que|que|mirando|la que|imposible",
    reason="sin (?:ninguna )?duda|claramente|porque|ya que|pues|puesto que|dado que|debido a|según|como (?:se"
    "|muestra|indica|puede|lo|la|el)|es decir|por ser|por el|por la|visto que",
    contrast=r"no (?=\S)|y no (?=\S)|en lugar de|en vez de",
    sentence="es|son|está|están|hay|tiene|tienen|muestra|muestran|creo|porque|puede|pueden|sería|parece|se"
    "|respuesta|era|fue|que|yo|no sé|necesito|vamos",
    copula=r"(?:(?:el|la|los|las|esto|eso|esta|este)(?: [\w-]+){0,6} )?(?:es|son|está|están)(?: de color)?",
    be="es|son|está|están",
    article="el|la|los|las|un|una|unos|unas|lo",
    yes="sí|si|verdadero|cierto|correcto",
    no="no|falso",
    about="unos|unas|aproximadamente|alrededor de|cerca de|casi|hay|un total de|en total",
    closing="gracias|fin|explicación",
)
FRENCH = Language(
    noun="réponse|reponse|solution|option|résultat|correction",
    answer="(?:bonne |vraie )?(?:réponse|reponse|solution)(?: (?:finale|correcte|exacte|définitive"
    "|juste))?(?: à la question)?|(?:bonne|meilleure) option|option correcte|résultat(?: final)?"
    r"|correction(?=\s?:)",
    verb="est|est la|serait|sont|est l'|sera",
    option="option|réponse|choix|lettre|proposition|l'option|la lettre",
    adverb="donc|alors|ainsi|clairement|simplement|par conséquent|bien",
    final="finale|définitive",
    denial="pas|non pas|jamais|ni|aucun[e]?",
    supposed="si|pas|pourquoi|quand|comment",
    premise="si",
    lead="la|ma|notre|donc|alors|ainsi|par conséquent|et|mais|bonne|je|pense|que|finale|est",
    limit="au moins|au plus|entre|moins",
    rejected=r"élimin\w+|exclu\w*|fausse|incorrecte",
    fault="faux|fausse|incorrecte?|erronée?|mauvaise?|inexacte?|invalide|erreur",
    others="autres|reste",
    retraction=r"attend(?:s|ez)|un instant|un moment|pardon\w*|correction|je (?:me )?corrige|corrigeons"
    r"|rectificat\w+|rectifie|en fait|en réalité|plutôt|désolée?|je me (?:suis )?trompée?|erreur"
    "|excuse[sz]?(?:-moi)?|oups|après réflexion|à la réflexion|réflexion faite|je voulais dire|je veux dire"
    "|recomptons|je recompte|en recomptant|en y regardant|enfin non|ou plutôt|devrait être|non non|mais non|euh"
    r"|autant pour moi|au temps pour moi|révis\w+|revoyons|vérifions",
    hedge=r"aucune idée|peut-être|peut être|probablement|possiblement|(?:pourrait"
    r"|peut)(?: \w+)? être|pas (?:\w+ )?(?:sûre?"
    r"|certaine?|clair)|je ne sais|je sais pas|il me semble|semble|ou bien|soit \S+ soit|difficile (?:à|de) (?:dire"
    r"|savoir|lire|voir)|dout[ea]\w*|dépend|(?:est|aussi|serait) possible|sans doute|sans certitude|incertaine?"
    "|à vrai dire|éventuellement|aussi (?:possible|correct|juste)|on dirait|vraisemblablement",
    opinion="je pense|je crois|je suppose|à mon avis",
    correct="(?:la |le )?(?:bonne|correcte?|juste|réponse)",
    alternative="ou|ou bien",
    both="et",
    but="mais|cependant|toutefois|pourtant",
    condition="si|sauf|excepté|quoique|bien que|sinon",
    remark="(?:très |assez |bien )?(?:claire?|évidente?|visible|simple|facile|difficile|inconnue?|indiquée?"
    "|donnée?|montrée?|affichée?)|peut|se (?:trouve|voit|lit|déduit)|dépend|(?:dans|sur|selon|par|d'après) (?:le "
    "|la |les |l')(?:graphique|figure|image|légende|tableau|diagramme)|dans|la suivante|il faut|je|j'ai|nous"
    "|voyons|regardons|comptons|commençons|d'abord|impossible|ce que|celle|suivante|pas",
    reason=r"sans aucun doute|bien sûr|car|parce qu['e]\s?|puisque?|étant donné|en raison|comme (?:le|la|on|l'"
    "|indiqué|montré|illustré|il|vu)|selon|d'après|c'est-à-dire|vu que|puisqu'",
    contrast=r"pas (?=\S)|et non|et pas|non (?=\S)|plutôt que|au lieu de",
    sentence="est|sont|ont|il|elle|je|nous|montre|montrent|parce|car|peut|semble|c'est|réponse|était|j'ai|y a|qui",
    copula=r"(?:(?:c'|(?:le|la|les|l'|ce|cela|cette|il|elle)(?:\s?[\w'-]+){0,6} ))?(?:est|sont)(?: de couleur)?",
    be="est|sont|c'est",
    article="le|la|les|un|une|des|du",
    yes="oui|vrai",
    no="non|faux",
    about="environ|à peu près|près de|presque|il y a|au total|un total de",
    closing="merci|explication",
)
GERMAN = Language(
    noun="antwort|lösung|option|ergebnis|korrektur",
    answer="(?:(?:endgültige|finale|richtige|korrekte|abschließende) )?(?:end|schluss)?(?:antwort"
    "|lösung)(?: auf die frage)?|(?:richtige|korrekte) option|(?:end)?ergebnis|korrektur(?=:)",
    verb="ist|lautet|wäre|sind|heißt|ist die|ist der|ist das",
    option="option|antwort|möglichkeit|buchstabe|auswahl|antwortmöglichkeit",
    adverb="also|daher|somit|folglich|demnach|deshalb|eindeutig|einfach",
    final="endgültige|finale|end(?=antwort|ergebnis|lösung)|schluss|abschließende",
    denial="nicht|keine?|nie|niemals|weder",
    supposed="wenn|falls|ob|nicht|warum|dass",
    premise="wenn|falls",
    lead="die|das|der|meine|unsere|also|daher|somit|folglich|damit|deshalb|ist|lautet|und|aber|richtige|korrekte",
    limit="mindestens|höchstens|zwischen|mehr als|weniger als",
    rejected="ausgeschlossen|falsche?",
    fault="falsche?|inkorrekt|fehlerhaft|fehler|ungültig|unzutreffend",
    others="anderen?|übrigen|rest",
    retraction=r"warte\w*|warten sie|moment mal|einen moment|moment[,.!]|nein doch|doch nicht|oder doch|nein|nee"
    r"|korrektur|korrigier\w+|entschuldig\w+|verzeih\w+|sorry|eigentlich|besser gesagt|genauer gesagt|(?:geirrt"
    "|vertan|verzählt|verrechnet|verlesen|versehen|getäuscht)|vielmehr|stimmt nicht|tut mir leid|ich meine"
    "|ich meinte|quatsch|falsch gezählt|nochmal|noch einmal|bei näherem|bei genauerem|bei genauer|fehler"
    r"|berichtigung|halt[,!.]|hoppla|ups|müsste|sollte|nehme (?:\w+ )?zurück",
    hedge="vielleicht|möglicherweise|(?:auch|ebenfalls|ist) möglich|wahrscheinlich|vermutlich|könnten?|kann auch"
    r"|nicht (?:\w+ )?(?:sicher|eindeutig|klar)|unsicher|bin mir|weiß (?:es )?nicht|ich schätze|schätzungsweise"
    r"|entweder|eventuell|womöglich|wohl|schwer zu|unklar|ungewiss|evtl|zweifel\w*|hängt|dürfte|scheint|anscheinend"
    "|keine ahnung|ebenfalls|ebenso",
    opinion="ich glaube|glaube ich|ich denke|denke ich|meiner meinung nach",
    correct="(?:die |das )?(?:richtige?|korrekte?|antwort)",
    alternative="oder|bzw|beziehungsweise",
    both="und",
    but="aber|jedoch|allerdings|sondern",
    condition="wenn|falls|sofern|außer|obwohl|doch",
    remark="(?:sehr |ganz |ziemlich |klar )?(?:klar|offensichtlich|eindeutig|ersichtlich|sichtbar|einfach|leicht"
    "|schwer|schwierig|unbekannt|unklar|gegeben|abzulesen|zu)|kann|lässt|im (?:diagramm|bild|text)"
    r"|in der (?:grafik|legende|tabelle|abbildung)|aus|wie folgt|folgende\w*|ich|wir|zunächst|zuerst|schauen"
    r"|lass\w*|hängt|nach|man|leider|unmöglich|steht|muss|betrachten|das was|die folgende",
    reason="ohne zweifel|zweifellos|eindeutig|weil|da|denn|wegen|aufgrund|laut|gemäß|wie (?:in|im|man|die|der|das"
    r"|gezeigt|ersichtlich|dargestellt|zu)|das heißt|d\.\s?h\.|nämlich",
    contrast="nicht|und nicht|statt|anstatt|anstelle",
    sentence="ist|sind|hat|haben|gibt|zeigt|zeigen|ich|weil|denn|kann|könnte|war|wir|es|antwort|lautet|muss|wird|man",
    copula=r"(?:es|das|dies|(?:der|die|das)(?: [\w-]+){1,6}) (?:ist|sind)",
    be="ist|sind",
    article="der|die|das|den|dem|ein|eine|einen|einem|einer",
    yes="ja|wahr|richtig",
    no="nein|falsch",
    about="etwa|ungefähr|circa|rund|fast|knapp|insgesamt|genau|nur|es gibt|es sind",
    closing="danke|ende|erklärung|begründung",
)
PORTUGUESE = Language(
    noun="resposta|solução|corret|certa|resultado|correção",
    answer="(?:resposta|solução)(?: (?:final|correta|certa|definitiva))?(?: à pergunta)?|(?:opção"
    "|alternativa) (?:correta|certa)|resultado(?: final)?|correção(?=:)",
    verb="é|é a|seria|são|será",
    option="opção|opcao|alternativa|resposta|letra|a opção|a letra|a alternativa",
    adverb="portanto|então|claramente|simplesmente|logo|assim|pois",
    final="final|definitiva",
    denial=r"não (?=\S)|nunca|nem|nenhuma?",
    supposed="se|não|quando|porque|embora",
    premise="se",
    lead="a|minha|nossa|portanto|logo|então|assim|e|mas|acho|que|é|final",
    limit="pelo menos|no máximo|entre|menos",
    rejected=r"descart\w+|errad[ao]|incorret[ao]",
    fault="incorret[ao]s?|falsa|errad[ao]s?|inválid[ao]",
    others="outr[ao]s|demais|resto",
    retraction=r"esper[ae]m?|um momento|não espera|descul\w+|perdão|perdoe|correção|corrig\w+|na verdade|aliás"
    r"|me enganei|enganad\w+|enganei|errei|melhor dizendo|quer dizer|quis dizer|quero dizer|digo|ou melhor"
    r"|pensando (?:bem|melhor)|olhando (?:de novo|melhor|bem)|retific\w+|erro|engano|equivoc\w+|recontando"
    "|contando de novo|deixe|deixa eu|deveria ser|deve ser|opa|ops|revendo|lamento|sinto muito",
    hedge=r"(?:não faço|nem) ideia|talvez|provavelmente|possivelmente|(?:pode|poderia)(?: \w+)? ser|não (?:tenho"
    r"|estou) (?:\w+ )?(?:certeza|cert[oa]|segur[oa])|não sei|não dá|quem sabe|quiçá|difícil (?:de )?(?:dizer"
    "|saber)|dúvidas?|depende|parece|ou então|também (?:é |pode |poderia )|incert[oa]|diria"
    r"|não é (?:\w+ )?(?:certo|claro|possível)",
    opinion="acho|penso|creio|acredito|suponho",
    correct=r"(?:a |o )?(?:\w+ )?(?:corret[ao]|cert[ao]|resposta)",
    alternative="ou",
    both="e",
    but="mas|porém|contudo|entretanto",
    condition="se|embora|exceto|salvo|a menos",
    remark="(?:muito |bem |bastante )?(?:clar[oa]|óbvi[oa]|evidente|visível|simples|fácil|difícil|desconhecid[oa])"
    "|pode|está|se encontra|encontra-se|depende|(?:no|na|do|da|pelo|pela) (?:gráfico|imagem|figura|legenda|tabela"
    "|diagrama)|a seguinte|preciso|vamos|primeiro,|eu|nós|não (?:sei|posso|está|é)|segundo|para|o que|que|olhando"
    "|impossível",
    reason="sem dúvida|porque|pois|já que|uma vez que|devido|dado que|conforme|segundo|como (?:se|mostra|mostrado"
    "|indica|indicado|pode|o|a|visto)|ou seja|visto que",
    contrast=r"não (?=\S)|e não (?=\S)|em vez de|ao invés de",
    sentence="é|são|está|estão|há|tem|têm|mostra|mostram|acho|porque|pode|podem|seria|parece|resposta|era|foi|que"
    "|eu|existem",
    copula=r"(?:(?:o|a|os|as|isso|isto|esta|este|essa|esse)(?: [\w-]+){0,6} )?(?:é|são|está|estão)(?: de cor)?",
    be="é|são|está|estão",
    article="o|a|os|as|um|uma|uns|umas",
    yes="sim|verdadeiro",
    no="não|falso",
    about="cerca de|aproximadamente|quase|uns|há|um total de|no total|ao todo",
    closing="obrigad[oa]|fim|explicação",
)
RUSSIAN = Language(
    noun="ответ|поправка|исправление",
    answer="(?:(?:окончательный|правильный|верный|итоговый|конечный) )?ответ(?: на вопрос)?|(?:поправка"
    "|исправление)(?=:)",
    verb="это|есть|будет|равен|является|таков|—|–|-",
    option="вариант|ответ|буква|вариант ответа|под буквой",
    adverb="следовательно|таким образом|итак|значит|поэтому|просто",
    final="окончательный|итоговый|конечный",
    denial="не|ни|нельзя",
    supposed="если|ли|не|когда|почему",
    premise="если",
    lead="мой|наш|итак|значит|следовательно|поэтому|таким образом|правильный|верный|окончательный|и|но|тогда|в итоге"
    "|получаем|что|отсюда",
    limit="не менее|не более|минимум|максимум|между",
    rejected=r"исключ\w+|неверн\w+|неправильн\w+",
    fault=r"неверн\w+|неправильн\w+|ошибочн\w+|ошибк\w+|ложн\w+",
    others=r"остальн\w+|друг\w+|прочи\w+",
    retraction=r"подожд\w+|погоди\w*|стоп|постой\w*|минутку|секунду|нет подожди\w*|хотя нет|извин\w+|прост(?:и|ите)"
    r"|прошу прощения|исправ\w+|поправ\w+|на самом деле|вернее|точнее|ошиб\w+|ой|переду\w+|пересчита\w+"
    r"|пересмотр\w+|если присмотреться|присмотрев\w+|вообще-то|то есть нет|не так|неверно|неправильно|виноват\w*"
    r"|оговори\w+|уточн\w+|хотя|имел\w* в виду|должно быть|должен быть",
    hedge=r"может быть|а может|возможно|наверное|наверно|вероятно|не (?:\w+ )?увер\w+|не знаю|кажется|либо"
    r"|скорее(?: всего)?|видимо|похоже|трудно сказать|сложно сказать|неясно|не ясно|сомн\w+|зависит|предполож\w+"
    r"|пожалуй|неизвестно|мог(?:ла|ло|ли)? бы|по-моему|затрудня\w+|не исключено|допуска\w+|тоже подходит",
    opinion="думаю|полагаю|считаю",
    correct=r"(?:правильн\w+|верн\w+)(?: ответ| вариант)?",
    alternative="или|либо",
    both="и",
    but="но|однако",
    condition="если|кроме|хотя|зато",
    remark=r"(?:очень |вполне |совершенно )?(?:очевид\w+|ясен|ясно|понят\w+|виден|видно|прост\w*|неизвест\w+)|можно"
    "|нужно|надо|находится|зависит|на (?:графике|рисунке|диаграмме|изображении|картинке)|в (?:легенде|таблице"
    r"|тексте)|следующ\w+|давайте|я|мы|сначала|посмотр\w+|чтобы|по (?:графику|рисунку|диаграмме)|невозможно|нельзя"
    r"|указан\w*|показан\w*|из",
    reason="без сомнения|несомненно|потому|так как|поскольку|ведь|как (?:показано|видно|указано)|согласно|судя"
    "|исходя|из-за|то есть|ибо",
    contrast="а не|не",
    sentence=r"это|есть|имеет|имеют|показывает|показано|я|мы|потому|может|является|составляет|изображен\w*|видно"
    r"|находится|ответ|был\w*",
    copula=r"(?:это|(?:[\w-]+ ){1,5}(?:—|–|-|это))",
    be="это|—|–",
    yes="да|верно|правда",
    no="нет|неверно|ложь",
    about="около|примерно|приблизительно|почти|всего|ровно|порядка",
    closing="спасибо|конец|объяснение|пояснение",
)
LANGUAGES = {
    "en": ENGLISH,
    "zh": CHINESE,
    "ja": JAPANESE,
    "es": SPANISH,
    "fr": FRENCH,
    "de": GERMAN,
    "pt": PORTUGUESE,
    "ru": RUSSIAN,
}
UNSPACED = frozenset({"zh", "ja"})
EAST_ASIAN = "\u3040-\u30ff\u4e00-\u9fff"
UNKNOWN_SCRIPT = re.compile(f"(?![Ѐ-ӿ{EAST_ASIAN}々ー\u0300-\u036fµμΩθαβπ])[\u0370-\U0001f000]")
LETTERS = "A-Za-z0-9_À-ÖØ-öø-ʯЀ-ӿ"  # of words with spaces between them


def word_set(text: str) -> frozenset[str]:
    """Return the set of the words of ``text``."""
    return frozenset(text.split())


def words(*names: str) -> str:
    """Return a regular expression that matches any of these fields of any language."""
    values = {code: [getattr(language, name) for name in names] for code, language in LANGUAGES.items()}
    spaced, unspaced = (
        "|".join(value for code in values if (code in UNSPACED) == apart for value in values[code] if value)
        for apart in (False, True)
    )
    parts = [rf"(?<![{LETTERS}])(?:{spaced})(?![{LETTERS}'])".replace(" ", r"\s+")] if spaced else []
    return f"(?:{'|'.join([*parts, unspaced] if unspaced else parts)})"
