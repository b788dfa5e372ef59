"""Keep the one table of what the model says about hybrid-k2 and its commands.

Change a command here, then train again: nothing else in this folder names one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

# Ways to ask how one does something; {} is an action such as "turn off thinking".
HOW = (
    "how do i {}",
    "how can i {}",
    "how to {}",
    "how do you {}",
    "i want to {}",
    "what is the command to {}",
    "which command do i use to {}",
    "how would i {}",
    "tell me how to {}",
    "can i {}",
    "is there a way to {}",
    "i would like to {}",
    "show me how to {}",
    "how does one {}",
)
# Ways to ask what a named thing does; {} is a name such as "/think".
WHAT = (
    "what does {} do",
    "what is {}",
    "what is {} for",
    "explain {}",
    "how does {} work",
    "when do i use {}",
    "tell me about {}",
    "how do i use {}",
)


@dataclass(frozen=True)
class Command:
    """Answer questions about one command: its actions, its names, and other whole questions."""

    about: str
    answer: str
    actions: str = ""
    names: str = ""
    other: str = ""

    def questions(self) -> Iterator[str]:
        """List every wording of the question."""
        for templates, fillers in ((HOW, self.actions), (WHAT, self.names)):
            for filler in filter(None, (f.strip() for f in fillers.split("|"))):
                yield from (template.format(filler) for template in templates)
        yield from filter(None, (q.strip() for q in self.other.split("|")))


COMMANDS = [
    Command(
        about="hybrid-k2",
        answer="hybrid-k2 is an inference engine. It runs Kimi K2.6 on one GPU together with host memory and the CPU.",
        names="hybrid-k2 | hybrid k2 | this program | this engine | this project | this software | hybridk2",
        other="what does hybrid-k2 run | what can hybrid-k2 do | what is this | what is this tool"
        " | what program is this | which engine is this | describe hybrid-k2",
    ),
    Command(
        about="where the work is done",
        answer="The experts are too big for one GPU. They stay in host memory, and the CPU computes those that the GPU "
        "does not hold.",
        other="why does it need the cpu | why use the cpu | why does the cpu hold experts | where do the experts live"
        " | where are the experts | why is the cpu used | why not only the gpu | why do you use host memory"
        " | why does hybrid-k2 use the cpu | why hybrid | why is it called hybrid",
    ),
    Command(
        about="machines without a GPU",
        answer="Yes. Without a GPU, hybrid-k2 keeps everything in host memory and computes on the CPU.",
        other="does it run without a gpu | do i need a gpu | can i run it without a gpu | does hybrid-k2 need a gpu"
        " | does it work on a cpu only | can it run on the cpu | does hybrid-k2 run without a gpu | is a gpu required"
        " | can i use only the cpu",
    ),
    Command(
        about="starting a chat",
        answer="Run `make chat`. It sets everything up and opens a chat with me, the demo model.",
        actions="start | start a chat | start the demo | open a chat | begin | run the demo | try the demo"
        " | chat with you"
        " | get started | run hybrid-k2 | try hybrid-k2",
        names="make chat",
    ),
    Command(
        about="the tests",
        answer="Run `make test`. It sets everything up and runs the tests.",
        actions="run the tests | test hybrid-k2 | run the test suite | check that it works | test it | start the tests",
        names="make test",
    ),
    Command(
        about="the real weights",
        answer="Run `hybrid-k2 chat PATH --rules FILE`, with the path of the Kimi K2.6 checkpoint and a rules file.",
        actions="chat with kimi k2.6 | use the real weights | use the real model | run kimi k2.6 | load the real model"
        " | chat with the real weights | run the big model | load a checkpoint | use my own checkpoint"
        " | chat with the full model | run the real kimi",
        names="hybrid-k2 chat",
    ),
    Command(
        about="answering once",
        answer="Use `hybrid-k2 chat --prompt TEXT`. It answers once and exits.",
        actions="ask one question | get one answer | answer once | ask a single question | use it in a script"
        " | give a prompt on the command line | pass a prompt | get a single answer",
        names="--prompt | the --prompt option | the prompt option",
    ),
    Command(
        about="JSON output",
        answer="Add `--json`. It prints one JSON object with the answer.",
        actions="get json | print json | get json output | read the answer in a program | get machine-readable output"
        " | have the answer as json",
        names="--json | the --json option | the json option",
    ),
    Command(
        about="the commands of the chat",
        answer="Type /help in the chat. It lists the commands: /think, /system, /clear, /regen, /save, /load, "
        "/stats and "
        "/exit.",
        actions="see the commands | list the commands | get help in the chat | see all commands | find the commands",
        names="/help | the help command",
        other="what commands are there | which commands are there | what are the commands | which commands do you have"
        " | list all commands | show the commands | commands | what commands can i use",
    ),
    Command(
        about="thinking",
        answer="Type /think off to turn thinking off, and /think on to turn it on again.",
        actions="turn off thinking | turn thinking off | disable thinking | stop the thinking | switch off thinking"
        " | turn on thinking | turn thinking on | enable thinking | switch thinking on | hide the thinking"
        " | get instant answers | use instant mode | stop you from thinking | turn off the thoughts",
        names="/think | the think command | /think off | /think on",
        other="how do i make you think | can you stop thinking | stop thinking | don't think | turn off thinking",
    ),
    Command(
        about="the system prompt",
        answer="Type /system TEXT to set the system prompt.",
        actions="set the system prompt | change the system prompt | give a system prompt | use a system prompt"
        " | set a system message | change the system message | edit the system prompt",
        names="/system | the system command",
    ),
    Command(
        about="starting again",
        answer="Type /clear. It forgets the conversation and starts again.",
        actions="start again | start over | clear the chat | clear the conversation | begin a new chat | reset the chat"
        " | forget the conversation | start a new conversation | delete the history | make you forget everything"
        " | reset",
        names="/clear | the clear command",
    ),
    Command(
        about="another answer",
        answer="Type /regen. It makes another answer to your last message.",
        actions="get another answer | regenerate | regenerate the answer | try the answer again | get a new answer"
        " | make you answer again | get a different answer | repeat the last question | retry",
        names="/regen | the regen command",
    ),
    Command(
        about="saving",
        answer="Type /save FILE. It saves the conversation to a file.",
        actions="save the conversation | save the chat | save this chat | store the conversation"
        " | keep the conversation"
        " | write the chat to a file | save my chat | save",
        names="/save | the save command",
    ),
    Command(
        about="loading",
        answer="Type /load FILE. It loads a saved conversation.",
        actions="load a conversation | load a chat | load a saved conversation | open a saved chat"
        " | continue a saved chat"
        " | restore a conversation | go on with an old chat | load",
        names="/load | the load command",
    ),
    Command(
        about="speed and memory",
        answer="Type /stats. It shows the speed in tokens per second and the memory in use.",
        actions="see the speed | see the statistics | see the memory use | see how fast you are | measure the speed"
        " | see tokens per second | check the memory | know the speed",
        names="/stats | the stats command",
        other="how fast are you | what is your speed | how much memory do you use | how fast is this",
    ),
    Command(
        about="leaving",
        answer="Type /exit to leave the chat.",
        actions="leave | exit | quit | leave the chat | quit the chat | exit the chat | close the chat | end the chat"
        " | stop the program | get out of here",
        names="/exit | the exit command",
        other="quit | exit",
    ),
    Command(
        about="stopping a reply",
        answer="Press Ctrl-C. It stops the reply, and the chat goes on.",
        actions="stop the reply | stop the answer | stop you | interrupt you | cancel the answer | stop a long answer"
        " | interrupt the reply | abort the reply | make you stop",
        names="ctrl-c | Ctrl-C | ctrl c",
    ),
    Command(
        about="rules",
        answer="A rules file is YAML in the folder rules/. It says which parts go on the GPU and which stay in host "
        "memory.",
        actions="choose what goes on the gpu | place experts on the gpu | change the placement | write rules"
        " | decide what the gpu holds | put layers on the gpu | use a rules file",
        names="a rules file | rules | the rules | --rules | the --rules option | a rule",
        other="where are the rules | what are rules | which parts go on the gpu | what goes on the gpu"
        " | what stays in host memory",
    ),
]
