/* Preloaded into a program: answers its CPUID instructions without the features that HIDDEN_CPU_FEATURES names.
 *
 * The kernel makes CPUID fault (arch_prctl, "CPUID faulting"), which lands in the handler here. What a program says about
 * SIGSEGV is kept aside, and called for every other fault. Children are masked too, as the variables go on to them. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define SET_CPUID 0x1012
#define BIT(n) (1u << (n))

enum { EAX, EBX, ECX, EDX };

struct hidden {
  const char* name;
  uint32_t leaf, subleaf, place, bits;
};

static const struct hidden known[] = {
    {"avx512", 7, 0, EBX, BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31)},
    {"avx512", 7, 0, ECX, BIT(1) | BIT(6) | BIT(11) | BIT(12) | BIT(14)},
    {"avx512", 7, 0, EDX, BIT(2) | BIT(3) | BIT(8) | BIT(23)},
    {"avx512", 7, 1, EAX, BIT(5)},
    {"avx512", 7, 1, EDX, BIT(19)}, /* AVX10 */
    {"avx512_vnni", 7, 0, ECX, BIT(11)},
    {"avx512_fp16", 7, 0, EDX, BIT(23)},
    {"avx512_bf16", 7, 1, EAX, BIT(5)},
    {"avx_vnni", 7, 1, EAX, BIT(4)},
    {"amx", 7, 0, EDX, BIT(22) | BIT(24) | BIT(25)},
    {"amx", 7, 1, EAX, BIT(21)},
};
enum { KNOWN = sizeof(known) / sizeof(*known) };

static int hides[KNOWN];
static int not_intel;
static struct sigaction programs;
static int (*set_action)(int, const struct sigaction*, struct sigaction*);

static void answer(greg_t* registers) {
  uint32_t leaf = registers[REG_RAX], subleaf = registers[REG_RCX], found[4];
  syscall(SYS_arch_prctl, SET_CPUID, 1L);
  __asm__ volatile("cpuid"
                   : "=a"(found[EAX]), "=b"(found[EBX]), "=c"(found[ECX]), "=d"(found[EDX])
                   : "a"(leaf), "c"(subleaf));
  syscall(SYS_arch_prctl, SET_CPUID, 0L);
  for (int i = 0; i < KNOWN; ++i)
    if (hides[i] && known[i].leaf == leaf && known[i].subleaf == subleaf) found[known[i].place] &= ~known[i].bits;
  if (leaf == 0 && not_intel) {
    memcpy(&found[EBX], "Auth", 4);
    memcpy(&found[EDX], "enti", 4);
    memcpy(&found[ECX], "cAMD", 4);
  }
  registers[REG_RAX] = found[EAX];
  registers[REG_RBX] = found[EBX];
  registers[REG_RCX] = found[ECX];
  registers[REG_RDX] = found[EDX];
}

static void on_fault(int number, siginfo_t* info, void* raw) {
  greg_t* registers = ((ucontext_t*)raw)->uc_mcontext.gregs;
  const uint8_t* instruction = (const uint8_t*)registers[REG_RIP];
  if (info->si_code == SI_KERNEL && instruction[0] == 0x0f && instruction[1] == 0xa2) {
    answer(registers);
    registers[REG_RIP] += 2;
  } else if (programs.sa_flags & SA_SIGINFO) {
    programs.sa_sigaction(number, info, raw);
  } else if (programs.sa_handler != SIG_DFL && programs.sa_handler != SIG_IGN) {
    programs.sa_handler(number);
  } else {
    /* the instruction faults again, and the program ends as it would have */
    struct sigaction usual = {.sa_handler = SIG_DFL};
    set_action(SIGSEGV, &usual, NULL);
  }
}

static int find_set_action(void) {
  if (!set_action) *(void**)&set_action = dlsym(RTLD_NEXT, "sigaction");
  return set_action != NULL;
}

int sigaction(int number, const struct sigaction* action, struct sigaction* before) {
  if (!find_set_action()) return -1;
  if (number != SIGSEGV) return set_action(number, action, before);
  if (before) *before = programs;
  if (action) programs = *action;
  return 0;
}

sighandler_t signal(int number, sighandler_t handler) {
  struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART}, before;
  return sigaction(number, &action, &before) ? SIG_ERR : before.sa_handler;
}

__attribute__((constructor)) static void mask(void) {
  char names[256];
  const char* asked = getenv("HIDDEN_CPU_FEATURES");
  if (!asked || strlen(asked) >= sizeof(names)) return;
  strcpy(names, asked);
  for (char* name = strtok(names, ","); name; name = strtok(NULL, ",")) {
    if (!strcmp(name, "intel")) not_intel = 1;
    for (int i = 0; i < KNOWN; ++i) hides[i] |= !strcmp(name, known[i].name);
  }
  struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK};
  if (!find_set_action() || set_action(SIGSEGV, &action, &programs) || syscall(SYS_arch_prctl, SET_CPUID, 0L)) {
    fputs("error: CPUID cannot be made to fault here\n", stderr);
    _exit(2);
  }
}
