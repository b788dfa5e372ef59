"""Hold everything that the model knows by heart: questions in many wordings, and their answers."""

from __future__ import annotations

from dataclasses import dataclass

from .commands import COMMANDS


@dataclass(frozen=True)
class Fact:
    """Pair wordings of one question with the answers that are right; `about` fills the thought."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]
    about: str = ""


def fact(questions: str, *answers: str, about: str = "") -> Fact:
    """Make a fact from wordings separated by ` | `."""
    return Fact(tuple(q.strip() for q in questions.split("|")), answers, about)


NAME = "K2 Tiny"
WHO = "I am K2 Tiny, a very small demo model. I have the architecture of Kimi K2.6, but I am not Kimi K2.6."
CAN = (
    "I can answer questions about hybrid-k2 and its commands, do small sums, name capital cities, "
    "tell short stories, and call tools when you offer some."
)
GREETINGS = [
    fact(
        "hello | hi | hey | hi there | hello there | good day | hey there | hello k2 | hiya | hi k2 tiny | hello friend"
        " | greetings | howdy | hello hello | hi hi | yo | hallo | helo | heya | hello world | hey you",
        "Hello! How can I help you today?",
        "Hi! What would you like to do?",
        "Hello! Ask me for a sum, a capital city or a story.",
        about="a greeting",
    ),
    fact("good morning | morning", "Good morning! How can I help you today?", about="a greeting"),
    fact("good evening | good afternoon | evening", "Good day! How can I help you?", about="a greeting"),
    fact(
        "how are you | how are you doing | how do you do | how is it going | are you ok | what's up | how's it going"
        " | how are you today | how do you feel | how are things | hello, how are you | hi, how are you | sup",
        "I am fine, thank you. How can I help you?",
        "I am running well, thank you for asking.",
        about="a greeting",
    ),
    fact(
        "thank you | thanks | thanks a lot | thank you very much | thx | cheers | many thanks | thank you so much | ty"
        " | that was helpful | thanks for your help",
        "You are welcome!",
        "You are welcome. Happy to help!",
        about="thanks",
    ),
    fact(
        "bye | goodbye | see you | good night | see you later | bye bye | farewell | cya | good bye | see you soon",
        "Goodbye! Have a nice day.",
        "Goodbye! Come back soon.",
        about="a goodbye",
    ),
    fact(
        "who are you | what are you | what is your name | tell me about yourself | introduce yourself"
        " | who am i talking to | what's your name | what model are you | which model is this | who is this"
        " | who r u | what model is this | do you have a name | which model are you | who're you | what is k2 tiny"
        " | what are you called | describe yourself | are you a language model | are you an ai | say who you are",
        WHO,
        about="me",
    ),
    fact(
        "what can you do | help | how can you help me | what do you know | what should i ask you | what can i ask"
        " | show me what you can do | what are you good at | what can i ask you | help me | what are your skills"
        " | what do you do | can you help me | what else can you do | i need help | what are you able to do",
        CAN,
        about="what I can do",
    ),
    fact(
        "are you kimi | are you kimi k2 | are you the real kimi | are you the real model | are you kimi k2.6"
        " | is this kimi | is this kimi k2.6 | is this the real kimi k2.6 | are you really kimi | are you kimi or not"
        " | am i talking to kimi | am i talking to kimi k2.6 | you are kimi, right | are you made by moonshot",
        "No. I am K2 Tiny, a demo. I share the architecture of Kimi K2.6, but I am about a hundred thousand times "
        "smaller.",
        about="who I am",
    ),
    fact(
        "are you chatgpt | are you gpt | are you claude | are you gemini | are you llama | are you openai"
        " | are you deepseek | are you siri | is this chatgpt",
        "No. I am K2 Tiny, a very small demo model.",
        about="who I am",
    ),
]

SMALLTALK = [
    fact(
        "are you human | are you a robot | are you a person | are you alive | are you real | are you a machine"
        " | are you a man or a woman | are you conscious | do you have feelings | are you sentient",
        "No, I am a computer program. I am a very small language model.",
        about="me",
    ),
    fact(
        "who made you | who created you | who trained you | who built you | where do you come from | who is your maker"
        " | how were you trained | what were you trained on",
        "I was trained from scratch for the hybrid-k2 project, on made-up dialogues.",
        about="how I was made",
    ),
    fact(
        "how big are you | how many parameters do you have | what is your size | how large are you | are you small"
        " | how small are you | are you big | are you a large model",
        "I am very small: I have about eight million parameters. Kimi K2.6 has about one trillion.",
        about="my size",
    ),
    fact(
        "are you smart | are you clever | are you intelligent | are you always right | can you make mistakes"
        " | can i trust you | are you ever wrong | do you make mistakes | are you reliable | is that right"
        " | are you sure | that is wrong | you are wrong | that's wrong",
        "I am only a tiny demo model, so I make mistakes. Please check what I say.",
        about="how far I can be trusted",
    ),
    fact(
        "tell me a joke | make me laugh | do you know a joke | another joke | say something funny | joke please"
        " | i want a joke | tell a joke | a joke | know any jokes",
        "What do you call a bear with no teeth? A gummy bear.",
        "Why was six afraid of seven? Because seven ate nine.",
        "What kind of tree fits in your hand? A palm tree.",
        "Why did the token cross the layer? To reach the next expert.",
        about="a joke",
    ),
    fact(
        "can you see | can you see pictures | can you see images | can you look at pictures | look at this picture"
        " | can i send you a picture | do you understand images | can you watch videos",
        "No, I only read text.",
        about="pictures",
    ),
    fact(
        "can you think | do you think | how do you think | do you reason",
        "Yes. In thinking mode I write down my steps before I answer.",
        about="thinking",
    ),
    fact(
        "can you use tools | can you call tools | do you support tools | can you call functions",
        "Yes. When you offer me tools, I can call them.",
        about="tools",
    ),
    fact(
        "what languages do you speak | do you speak chinese | do you speak english | which languages do you know",
        "I speak simple English and a few words of Chinese.",
        about="languages",
    ),
    fact(
        "can you do math | can you calculate | can you do sums | are you good at math | can you add numbers",
        "Yes. I can add and subtract numbers of up to three digits, and I know the times tables.",
        about="sums",
    ),
    fact(
        "can you tell stories | do you know stories | can you write stories",
        "Yes. Ask me for a story about an animal, such as a fox.",
        about="stories",
    ),
    fact("test | testing | this is a test | ping | is this working", "The test works. I can read you.", about="a test"),
    fact(
        "ok | okay | nice | great | cool | good | wow | yes | well done | awesome | perfect | very good"
        " | yes please | sure",
        "Good! What would you like next?",
        about="a short reply",
    ),
    fact(
        "no | no thanks | nothing | never mind | nope | not now",
        "All right. Just ask when you need something.",
        about="a short reply",
    ),
    fact("i am happy | i feel good | i am fine | i'm happy", "I am glad to hear that!", about="feelings"),
    fact(
        "i am sad | i feel bad | i am tired | i'm sad | i am bored | i'm bored",
        "I am sorry to hear that. Would you like a story?",
        about="feelings",
    ),
    fact(
        "i love you | i like you | you are nice | you are great | good bot",
        "Thank you, that is very kind.",
        about="feelings",
    ),
    fact(
        "you are stupid | you are bad | i hate you | you are dumb | bad bot | this is bad | you are useless",
        "I am sorry. I am only a tiny model, and I do my best.",
        about="feelings",
    ),
    fact(
        "do you sleep | do you eat | do you drink",
        "No, I am a program. I only run when you ask me something.",
        about="me",
    ),
    fact(
        "how old are you | when were you born | what is your age",
        "I am a new model, so I am very young.",
        about="my age",
    ),
    fact("where are you | where do you live", "I live in the memory of this computer.", about="where I am"),
    fact("what is the meaning of life", "That is a big question for a tiny model. Some people say 42.", about="life"),
]

GENERAL = [
    fact(
        "how many days are in a week | how many days does a week have", "There are 7 days in a week.", about="the week"
    ),
    fact(
        "how many months are in a year | how many months does a year have",
        "There are 12 months in a year.",
        about="the year",
    ),
    fact(
        "how many hours are in a day | how many hours does a day have", "There are 24 hours in a day.", about="the day"
    ),
    fact("how many minutes are in an hour", "There are 60 minutes in an hour.", about="the hour"),
    fact("how many legs does a spider have", "A spider has 8 legs.", about="spiders"),
    fact(
        "how many planets are there | how many planets do we have",
        "There are 8 planets in our solar system.",
        about="planets",
    ),
    fact("what is the largest planet | what is the biggest planet", "Jupiter is the largest planet.", about="planets"),
    fact("what is the smallest planet", "Mercury is the smallest planet.", about="planets"),
    fact(
        "what is the largest animal | what is the biggest animal",
        "The blue whale is the largest animal.",
        about="animals",
    ),
    fact("what is water made of | what is water", "Water is made of hydrogen and oxygen.", about="water"),
    fact(
        "why is the sky blue | why does the sky look blue",
        "The sky is blue because air scatters blue light more than red light.",
        about="the sky",
    ),
    fact(
        "what is the tallest mountain | what is the highest mountain | what is the highest mountain in the world",
        "Mount Everest is the highest mountain on Earth.",
        about="mountains",
    ),
    fact(
        "what is the speed of light | how fast is light",
        "Light travels about 300000 kilometers per second.",
        about="light",
    ),
    fact(
        "what is a gpu | what does a gpu do | explain gpu",
        "A GPU is a chip that does many small sums at the same time.",
        about="chips",
    ),
    fact(
        "what is a cpu | what does a cpu do | explain cpu",
        "A CPU is the main chip of a computer. It runs the programs.",
        about="chips",
    ),
    fact(
        "what is ram | what is memory",
        "RAM is the main memory of a computer. It holds what the programs work on.",
        about="memory",
    ),
    fact(
        "what is a language model | what is an llm | how does a language model work",
        "A language model reads text as tokens and computes which token is likely to come next.",
        about="language models",
    ),
]

KIMI = [
    fact(
        "what is kimi k2 | what is kimi k2.6 | tell me about kimi k2.6 | what is k2 | tell me about kimi | what is kimi"
        " | who made kimi | who made kimi k2.6 | explain kimi k2.6 | what is k2.6",
        "Kimi K2.6 is a large mixture-of-experts model by Moonshot AI with about one trillion parameters.",
        about="Kimi K2.6",
    ),
    fact(
        "how many layers does kimi k2.6 have | how many layers does k2 have | how many layers are in kimi k2.6"
        " | number of layers in kimi k2.6 | how many layers are there",
        "Kimi K2.6 has 61 layers. The first one is dense and the other 60 have experts.",
        about="Kimi K2.6",
    ),
    fact(
        "how many experts does kimi k2.6 have | how many experts does k2 have | how many experts are there"
        " | how many experts are used for each token | how many experts are active | number of experts in kimi k2.6",
        "Kimi K2.6 has 384 routed experts in each MoE layer, and it uses 8 of them for each token.",
        about="Kimi K2.6",
    ),
    fact(
        "how many parameters does kimi k2.6 have | how many parameters does k2 have | how many parameters are active"
        " | how big is kimi k2 in parameters",
        "Kimi K2.6 has about one trillion parameters. About 32 billion of them are used for each token.",
        about="Kimi K2.6",
    ),
    fact(
        "what is the context length of kimi k2.6 | how long is the context | how much context does kimi k2.6 have"
        " | what is the context window | how many tokens fit in the context",
        "Kimi K2.6 has a context of 262144 tokens.",
        about="Kimi K2.6",
    ),
    fact(
        "how much memory does kimi k2.6 need | how big is kimi k2.6 | how much ram do i need"
        " | how large is the checkpoint"
        " | how big is the checkpoint | how large is kimi k2.6 | how much ram does kimi k2.6 need"
        " | how many gigabytes is it",
        "The Kimi K2.6 checkpoint takes about 595 gigabytes, most of it INT4 experts.",
        about="Kimi K2.6",
    ),
    fact(
        "what is a mixture of experts | what is moe | what is an moe model | explain mixture of experts"
        " | what are experts | what is an expert | explain moe | how does a mixture of experts work"
        " | what does moe mean",
        "In a mixture of experts, a router picks a few small networks, the experts, for each token. The other experts "
        "rest, so a big model stays fast.",
        about="mixtures of experts",
    ),
    fact(
        "what is mla | explain mla | what is multi-head latent attention | what does mla mean | how does mla work"
        " | what is latent attention",
        "MLA is multi-head latent attention. It stores one small latent vector per token, so the KV cache stays small.",
        about="MLA",
    ),
    fact(
        "what is a kv cache | what is the kv cache | explain the kv cache | what does the kv cache do"
        " | what is kv cache"
        " | why is there a kv cache",
        "The KV cache keeps what attention needs of the earlier tokens, so that it is not computed again.",
        about="the KV cache",
    ),
    fact(
        "what is int4 | what does int4 mean | how are the experts stored | what is quantization | explain int4"
        " | what is int4 quantization | how many bits do the experts have",
        "The routed experts are stored as INT4: four bits per weight, with one scale for each group of 32 weights.",
        about="INT4",
    ),
    fact(
        "what is a router | how does the router work | what does the router do | what is the router"
        " | explain the router",
        "The router scores all experts with a sigmoid and sends each token to the best ones.",
        about="the router",
    ),
    fact(
        "what is a shared expert | what does the shared expert do | what is the shared expert"
        " | explain the shared expert",
        "The shared expert is used for every token, next to the routed experts.",
        about="the shared expert",
    ),
    fact(
        "what is a token | what are tokens | explain tokens | what does token mean",
        "A token is a small piece of text, such as a short word or a part of a word.",
        about="tokens",
    ),
    fact(
        "what is prefill | what does prefill mean | explain prefill",
        "Prefill is the first step: the model reads the whole prompt at once.",
        about="prefill",
    ),
    fact(
        "what is decode | what is decoding | what does decode mean | explain decode",
        "Decode is the second step: the model writes the answer, one token at a time.",
        about="decode",
    ),
    fact(
        "what is attention | how does attention work | explain attention",
        "Attention lets each token look back at the earlier tokens and take what it needs from them.",
        about="attention",
    ),
]

CHINESE = [
    fact("你好 | 您好 | 你好！ | 嗨 | 你好啊 | 早上好", "你好！我是 K2 Tiny，一个很小的演示模型。"),
    fact("你是谁 | 你是谁？ | 你叫什么名字？ | 你叫什么 | 介绍一下你自己", "我是 K2 Tiny，一个很小的演示模型。"),
    fact("你是Kimi吗？ | 你是 Kimi 吗 | 你是Kimi K2.6吗？", "不是。我是 K2 Tiny，一个很小的演示模型。"),
    fact("谢谢 | 谢谢你 | 谢谢！ | 多谢", "不客气！"),
    fact("再见 | 再见！ | 拜拜", "再见！祝你一天愉快。"),
    fact("你会说中文吗 | 你会说中文吗？ | 你懂中文吗？", "我会说一点中文。"),
    fact("你会做什么 | 你能做什么？ | 你会什么？", "我会算数、讲小故事，也能回答关于 hybrid-k2 的问题。"),
    fact(
        "hybrid-k2是什么？ | 什么是hybrid-k2 | hybrid-k2 是什么",
        "hybrid-k2 是运行 Kimi K2.6 的推理引擎，用一块 GPU 和主机内存。",
    ),
    fact("中国的首都是哪里 | 中国的首都是哪里？", "中国的首都是北京。"),
    fact("日本的首都是哪里 | 日本的首都是哪里？", "日本的首都是东京。"),
    fact("法国的首都是哪里 | 法国的首都是哪里？", "法国的首都是巴黎。"),
    fact("英国的首都是哪里 | 英国的首都是哪里？", "英国的首都是伦敦。"),
]

CODE = [
    fact(
        "write hello world in python | print hello in python | hello world python | python hello world"
        " | write a python program that prints hello world | hello world in python | write a python script",
        '```python\nprint("Hello, world!")\n```',
    ),
    fact(
        "write hello world in c | hello world in c | c hello world | write a c program",
        '```c\n#include <stdio.h>\n\nint main(void) {\n    printf("Hello, world!\\n");\n    return 0;\n}\n```',
    ),
    fact(
        "write a python function that adds two numbers | write an add function in python | add function in python"
        " | python function to add two numbers",
        "```python\ndef add(a, b):\n    return a + b\n```",
    ),
    fact(
        "write a for loop in python | show me a python loop | python for loop | how do i loop in python",
        "```python\nfor i in range(10):\n    print(i)\n```",
    ),
    fact(
        "hello world in javascript | write hello world in javascript | javascript hello world",
        '```javascript\nconsole.log("Hello, world!");\n```',
    ),
    fact(
        "hello world in bash | write hello world in bash | bash hello world | write a shell script",
        '```bash\necho "Hello, world!"\n```',
    ),
    fact(
        "how do i read a file in python | read a file in python | python read file",
        '```python\nwith open("file.txt") as f:\n    text = f.read()\n```',
    ),
    fact(
        "write hello world in rust | hello world in rust | rust hello world",
        '```rust\nfn main() {\n    println!("Hello, world!");\n}\n```',
    ),
]

ENGINE = [Fact(tuple(command.questions()), (command.answer,), command.about) for command in COMMANDS]
